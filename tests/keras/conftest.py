import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest
import tensorflow as tf

for of in ("intra_op", "inter_op"):
    getattr(tf.config.threading, f"set_{of}_parallelism_threads")(1)


@pytest.fixture(autouse=True)
def _fresh():
    """Names and random weights of each test are its own."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")
