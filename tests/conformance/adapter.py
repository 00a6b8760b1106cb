"""How to hold a new adapter against the conformance kit.

1. Write one file beside this one, with a subclass of `Adapter`: NumPy in, NumPy out (ml_dtypes' bfloat16 included).

       class MineAdapter(Adapter):
           name = "mine"
           lacks = {"codes": "mine has no codes, only values"}

           def quantize(self, x, fmt, **options):
               return np.asarray(my_quantize(x, fmt, **options))

2. Add it to `ADAPTERS` in test_conformance.py.

`checks.py` has one check for each family of cases. A family that an adapter cannot have goes into its `lacks`, with the
reason; it is shown as a skip. The answers in cases/*.json come from ml_dtypes, gfloat and exact arithmetic, never from
mezzo: `generate.py` writes them, and its head says what is in each file. Bits are compared, but for the payload and
the sign of NaN; results of products lie within a derived bound, since the order of their sums is free.
"""


class Adapter:
    name = ""
    lacks: dict[str, str] = {}  # noqa: RUF012 - family → why; a subclass replaces it

    def quantize(self, x, fmt, *, axis=-1, rounding="nearest", overflow="saturate", key=None, scale=None):
        """As `mezzo.formats.quantize`: the same values, shape and dtype."""
        raise NotImplementedError

    def decode(self, codes, fmt):
        """float32 values of codes of an element format, as `mezzo.formats.decode`."""
        raise NotImplementedError

    def encode(self, x, fmt):
        """Codes of values, as `mezzo.formats.encode`."""
        raise NotImplementedError

    def encode_scaled(self, x, fmt, *, axis=-1):
        """(codes, scales, tensor scale or None), as in `mezzo.formats.Encoded`."""
        raise NotImplementedError

    def bits(self, seed, step, site, count):
        """(count,) words of the counter-based generator, as integers."""
        raise NotImplementedError

    def hadamard(self, x, *, axis=-1, block=16, seed=0, inverse=False):
        """As `mezzo.formats.hadamard`."""
        raise NotImplementedError

    def routes(self):
        """The declared routes that products can take here: of "emulated" and "native"."""
        return ["emulated"]

    def product(self, a, b, g, formats, route):
        """y = a·bᵀ of a (rows, in), b (out, in), and its gradients for the incoming g (rows, out), all float32.

        formats   role → format, for the nine roles of a product
        returns   {"fprop": y, "dgrad": the gradient of a, "wgrad": the gradient of b}, float32
        """
        raise NotImplementedError

    def loss_scales(self, scaling, overflows):
        """After each step (scale, good, bad, at_floor), the fields of `mezzo.policy.ScaleState`.

        scaling     arguments of `mezzo.policy.LossScaling`; the others keep their defaults
        overflows   for each step whether a gradient was not finite
        """
        raise NotImplementedError
