"""Search in whole models: scores, maps and leave-one-out scores of parts that aren't aligned."""

import pytest
import torch

from padim_ray import ModelError, PadimModel
from tests.model.test_padim_model import images

SETTINGS = {"image_size": 96, "n_features": 30, "precision": "float32", "score_share": 0.1}


def fitted(weights, train, **options):
    model = PadimModel(weights=weights, **SETTINGS | options)
    model.update(train)
    return model


def pictures(first, count, shift):
    """Parts of pictures; with a shift of so many pixels upwards and to the left."""
    return images(0, 40, 128)[first : first + count, :, shift : shift + 96, shift : shift + 96]


@pytest.mark.parametrize("stride", [8, 16])
def test_a_score_is_that_of_searching_everywhere(weights, stride):
    train, test = pictures(0, 20, 0), pictures(20, 5, 16)
    one, everywhere, without = (
        fitted(weights, train, stride=stride, **options)
        for options in ({"search": 2}, {"search": 2, "search_maps": True}, {})
    )
    scores, maps = one.score(test)
    all_scores, all_maps = everywhere.score(test)
    torch.testing.assert_close(scores, all_scores, rtol=1e-4, atol=0)
    assert torch.equal(maps, without.score(test).maps)
    assert (all_maps <= maps + 1e-4).all() and (all_maps < 0.9 * maps).any()
    assert (scores < without.score(test).scores).all()


@pytest.mark.parametrize("options", [{}, {"search_maps": True}, {"score_share": 0.0}])
def test_leave_one_out_scores_are_those_of_refitting(weights, options):
    train = images(0, 9, 96)
    scores = fitted(weights, train, search=1, **options).calibrate(train)
    for image in (0, 4, 8):
        others = fitted(
            weights, torch.cat([train[:image], train[image + 1 :]]), search=1, **options
        )
        alone = others.score(train[image : image + 1])
        torch.testing.assert_close(scores[image : image + 1], alone.scores, rtol=0.01, atol=0)


def test_without_a_share_the_score_is_the_searched_maps_maximum(weights):
    model = fitted(weights, images(0, 9, 96), search=1, score_share=0.0)
    scores, maps = model.score(images(1, 3, 96))
    assert torch.equal(scores, maps.amax((1, 2)))
    smooth = model.score(images(1, 3, 96), sigma=9)
    assert torch.equal(smooth.scores, smooth.maps.amax((1, 2))) and (smooth.scores < scores).all()


def test_an_image_without_finite_features_has_no_score(weights):
    model = fitted(weights, images(0, 9, 96), search=1)
    embeddings = model._detector.embed(images(1, 3, 96))[torch.arange(3)]
    with torch.inference_mode():
        embeddings.levels[0][1, 5] = torch.nan
    scores = model._detector.measure(embeddings, model._density("default")).scores
    assert torch.isfinite(scores).tolist() == [True, False, True]


def test_a_part_that_moved_by_one_cell_is_found_again(weights):
    train = pictures(0, 30, 0)
    with_search, without = (fitted(weights, train, search=search) for search in (1, 0))
    rise = [
        model.score(pictures(30, 4, 16)).scores / model.score(pictures(30, 4, 0)).scores
        for model in (with_search, without)
    ]
    assert (rise[0] < 0.9 * rise[1]).all()


def test_it_is_saved_with_the_model(weights, tmp_path):
    model = fitted(weights, images(0, 9, 96), search=2, search_maps=True)
    model.save(str(tmp_path / "model"))
    loaded = PadimModel.load(str(tmp_path / "model"))
    assert (loaded.spec.search, loaded.spec.search_maps) == (2, True)
    test = images(1, 3, 96)
    assert torch.equal(loaded.score(test).scores, model.score(test).scores)


def test_what_cannot_be_searched_is_refused(weights):
    with pytest.raises(ModelError, match="The density shared can't search: leave out --search"):
        PadimModel(weights=weights, **SETTINGS, density="shared", search=1)
    with pytest.raises(ModelError, match="search must be from 0 to 4 cells, not 5"):
        PadimModel(weights=weights, **SETTINGS, search=5)
