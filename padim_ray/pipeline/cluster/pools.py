"""Ray Data's pools of actors and tasks, as a plan divides the cluster."""

from ray.data import ActorPoolStrategy, TaskPoolStrategy

from padim_ray.planning.resources import Plan

SHARDS_WORTH_AN_ACTOR = 8  # a node takes minutes to come, a shard of images seconds


def actor_pool(plan: Plan, shards: int, **settings: int) -> ActorPoolStrategy:
    """A pool of actors for a stage's shards of images.

    It never has fewer actors than there was room for at first: one that shrinks while decoding
    falls behind for some seconds would load its models again. It grows when nodes join.
    """
    room = max(1, min(plan.actors, shards))
    worth = max(room, min(plan.most_actors or shards, shards // SHARDS_WORTH_AN_ACTOR))
    return ActorPoolStrategy(
        min_size=room,
        initial_size=max(room, min(plan.asked_actors, worth)),
        max_size=room if plan.most_actors == plan.actors else worth,
        **settings,
    )


def decoding_tasks(plan: Plan, shards: int) -> TaskPoolStrategy:
    """A pool of tasks for decoding a stage's shards of images."""
    return TaskPoolStrategy(size=min(plan.decode_tasks or shards, shards))


def drawing_tasks(plan: Plan, shards: int) -> TaskPoolStrategy:
    """A pool of helper tasks for a stage without actors."""
    most = plan.decoders + plan.actors if plan.decoders else shards
    return TaskPoolStrategy(size=min(most, shards))
