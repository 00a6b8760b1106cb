import pytest

import mezzo
import mezzo.formats
import mezzo.policy
import mezzo.torch

FORMATS = {"AnyFormat", "BFLOAT16", "Encoded", "FLOAT16", "FLOAT32", "FLOAT64", "FORMATS", "Format", "SCALED",
           "ScaledFormat", "TF32", "decode", "decode_scaled", "encode", "encode_scaled", "get_element", "get_format",
           "hadamard", "quantize"}  # fmt: skip
PUBLIC = {
    mezzo: {"RECIPES", "Format", "LossScaling", "MezzoError", "Policy", "Rule", "Site", "__version__", "get_format",
            "quantize"},
    mezzo.formats: FORMATS,
    mezzo.policy: {"LossScaling", "Phase", "Policy", "RECIPES", "Recipe", "Rule", "ScaleState", "Schedule", "Site",
                   "Spec"},
    mezzo.torch: {"CONTRACT", "FastCpu", "Observer", "Phases", "Precision", "Pruner", "SiteRow", "Step", "fast_cpu",
                  "hadamard", "observe", "quantize", "what_if"},
}  # fmt: skip


def test_the_public_names_are_these_and_exist():
    for module, names in PUBLIC.items():
        assert set(module.__all__) == names, module.__name__
        assert all(hasattr(module, name) for name in names)


def test_the_package_has_at_most_fifteen_public_names():
    assert len(mezzo.__all__) <= 15


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert mezzo.torch.Precision is not None
    with pytest.raises(AttributeError, match="module 'mezzo' has no attribute 'jaxx'"):
        mezzo.jaxx  # noqa: B018
