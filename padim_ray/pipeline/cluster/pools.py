"""Ray Data's pools of actors and tasks, sized by a job's plan."""

from ray.data import ActorPoolStrategy, TaskPoolStrategy

from padim_ray.planning.resources import Plan

MIN_SHARDS_PER_ACTOR = 8  # a new node takes minutes to start, a shard takes seconds


def actor_pool(
    plan: Plan, shards: int, *, max_tasks_in_flight_per_actor: int | None = None
) -> ActorPoolStrategy:
    """A pool of actors for a stage's shards of images.

    The pool grows when nodes join, and never has fewer actors than there was room for at first. A
    pool that shrank whenever decoding falls behind for some seconds would load the models again.
    """
    room = max(1, min(plan.actors, shards))
    worth = max(room, min(plan.most_actors or shards, shards // MIN_SHARDS_PER_ACTOR))
    return ActorPoolStrategy(
        min_size=room,
        initial_size=max(room, min(plan.asked_actors, worth)),
        max_size=room if plan.most_actors == plan.actors else worth,
        max_tasks_in_flight_per_actor=max_tasks_in_flight_per_actor,
    )


def decoding_pool(plan: Plan, shards: int) -> TaskPoolStrategy:
    """A pool of tasks for decoding a stage's shards of images."""
    return TaskPoolStrategy(size=min(plan.decode_tasks or shards, shards))


def drawing_pool(plan: Plan, shards: int) -> TaskPoolStrategy:
    """A pool of helper tasks for a stage without actors."""
    free = plan.decoders + plan.actors if plan.decoders else shards
    return TaskPoolStrategy(size=min(free, shards))
