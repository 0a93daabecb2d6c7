"""Files of a model: tensors come back in the order in which a state names them."""

import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.model.files import load_tensors
from padim_ray.storage.location import Location


@given(st.lists(st.text("abcxyz", min_size=1, max_size=3), min_size=1, unique=True))
def test_tensors_come_in_the_order_that_is_expected(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("model")
    kinds = [torch.float32, torch.float64, torch.int64]
    tensors = {name: torch.ones(3, dtype=kinds[len(name) % 3]) for name in names}
    safetensors.torch.save_file(tensors, root / "file.safetensors")
    location = Location.of(str(root))
    expected = {name: tensor.to("meta") for name, tensor in tensors.items()}
    loaded = load_tensors(location, location / "file.safetensors", expected, list)
    assert loaded == names
