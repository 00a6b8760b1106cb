"""What `mezzo.keras` runs on: Keras 3 over TensorFlow. Imported before the rest of the package, which needs both."""

from mezzo.errors import ConfigError, require


def check() -> None:
    """See that Keras is there and runs on TensorFlow.

    raises    MissingExtraError that names a missing package; ConfigError if Keras runs on something else
    """
    require("tensorflow", extra="tensorflow", option="mezzo.keras")
    keras = require("keras", extra="tensorflow", option="mezzo.keras")
    name = keras.backend.backend()
    if name != "tensorflow":
        raise ConfigError(
            f"mezzo.keras carries policies out under TensorFlow, and Keras runs on {name}; set "
            "KERAS_BACKEND=tensorflow before keras is imported"
        )


def as_is(error: ConfigError) -> ConfigError:
    """The error, marked so that neither Keras nor autograph wraps it into one of theirs or adds to its text."""
    error._keras_call_info_injected = True  # type: ignore[attr-defined]
    error.ag_pass_through = True  # type: ignore[attr-defined]
    return error


check()
