"""Every adapter against every family of cases; adapter.py says how to add one."""

import generate
import pytest
import torch
from checks import CASES, FAMILIES, check_blocks, check_elements, check_hadamard, check_stochastic, load, run
from jax_adapter import JaxAdapter
from keras_adapter import KerasAdapter
from numpy_adapter import NumpyAdapter
from torch_adapter import CompiledAdapter, HelperAdapter, MatmulAdapter, TorchAdapter

from mezzo.torch import helper

ADAPTERS = [NumpyAdapter(), TorchAdapter(), HelperAdapter(), JaxAdapter(), KerasAdapter()]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_an_adapter_gives_the_answers_of_the_oracles(adapter, family):
    if family in adapter.lacks:
        pytest.skip(f"{adapter.name} lacks {family}: {adapter.lacks[family]}")
    if isinstance(adapter, HelperAdapter) and helper.load() is None:
        pytest.skip(f"no compiled helper here: {helper.status()}")
    run(adapter, family)


def test_products_of_any_two_tensors_give_the_answers_of_the_oracles():
    run(MatmulAdapter(), "products")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own imports
def test_compiled_torch_gives_the_answers_of_the_oracles_on_a_few_cases():
    torch._dynamo.reset()
    compiled = CompiledAdapter()
    few = [
        (check_elements, "elements", lambda c: c["format"] == "float8_e4m3fn" and c["x"].startswith("float32")),
        (check_stochastic, "stochastic", lambda c: c["format"] == "bfloat16" and c["x"].startswith("float32")),
        (check_blocks, "blocks", lambda c: c["what"] == "the order of scale operations"),
        (check_hadamard, "hadamard", lambda c: c["what"] == "another seed"),
    ]
    for check, name, chosen in few:
        (case,) = filter(chosen, load(name))
        check(compiled, case)
    torch._dynamo.reset()


def test_every_family_an_adapter_lacks_is_a_family_and_has_a_reason():
    for adapter in ADAPTERS:
        assert all(family in FAMILIES and reason for family, reason in adapter.lacks.items())


def test_the_files_of_cases_are_what_generate_writes():
    made = generate.files()
    assert sorted(made) == sorted(path.name for path in CASES.iterdir())
    for name, text in made.items():
        # Not ==, whose explanation of a difference between two texts of this size takes minutes.
        assert (CASES / name).read_bytes() == text.encode() or pytest.fail(f"run generate.py: {name} has changed")
    assert sum(map(len, made.values())) < 400_000
