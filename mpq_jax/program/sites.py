"""What dataflow finds in a traced program: sites, products, norms, and what reads them.

A *site* is a convolution, a dot product or a lookup in which one operand comes from variables
alone and the other one from data. No module library is known here.
"""

from typing import NamedTuple

from mpq_jax.program.evaluate import Key, Place

STATE = "batch_stats/"  # begins the paths of running statistics


class Value(NamedTuple):
    """What is known of a value of the program.

    Attributes:
        number: identity of the value.
        holds: identity of its elements: moved and converted values hold those of the first one.
        place: the result that it is; None: an argument or a constant.
        data: whether it depends on the inputs; otherwise on variables and constants alone.
        leaf: path of the variable that it holds; None: it is computed.
        moved: whether the variable is in another layout.
        leaves: all variables that it depends on, if it does not depend on data.
        stacked: depths of the loops that slice the variable.
        depth: largest number of sites between the inputs and this value.
        nearest: sites that reach it without another site in between.
        site: site whose result it is, but for layout, conversions and a bias.
        normed: site whose result it is, but for these and a norm.
        owner: path of the module whose parameters and statistics this norm read so far.
        alone: whether a single equation reads it, or returns it.
        start: first place that reads its elements in a chain of moves and conversions that nothing
            else reads; None: it is no end of such a chain.
        running: running statistic that it is, updated or not.
        decayed: running statistic of which it is a constant multiple.
        scaled: place of the value of which it is a constant multiple.
        multiplied: whether a product of activations reaches it without a site in between.
    """

    number: int
    holds: int
    place: Place | None = None
    data: bool = False
    leaf: str | None = None
    moved: bool = False
    leaves: frozenset[str] = frozenset()
    stacked: tuple[int, ...] = ()
    depth: int = 0
    nearest: frozenset[int] = frozenset()
    site: int | None = None
    normed: int | None = None
    owner: str | None = None
    alone: bool = False
    start: Place | None = None
    running: str | None = None
    decayed: str | None = None
    scaled: Place | None = None
    multiplied: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether it depends on no argument."""
        return not self.data and not self.leaves


class Site(NamedTuple):
    """One product of the program.

    Attributes:
        key: its equation.
        kind: "conv", "depthwise", "dense" or "embedding".
        kernel: place of the operand that comes from variables.
        data: place at which the other operand is read: before moves and conversions, where
            nothing else reads what lies between. None: a lookup has none.
        leaf: path of the variable that the kernel is, in some layout; None: it is computed.
        leaves: all variables that the kernel depends on.
        kernel_shape: shape of the operand.
        loops: lengths of the loops around the site, from the outermost inwards.
        stacked: depths of those among them that slice the kernel; 0 is the outermost.
        macs: multiply-accumulates of one call.
        inputs: number of values that it reads in one call.
        channels: output channels.
        reads: identity of the elements that it reads.
        depth: largest number of sites between the inputs and this one.
        first_depth: the same in the first turn of the loops around it.
        scope: names under which the model calls it.
    """

    key: Key
    kind: str
    kernel: Place
    data: Place | None
    leaf: str | None
    leaves: frozenset[str]
    kernel_shape: tuple[int, ...]
    loops: tuple[int, ...]
    stacked: tuple[int, ...]
    macs: int
    inputs: int
    channels: int
    reads: int
    depth: int
    first_depth: int
    scope: str

    @property
    def slices(self) -> tuple[int, ...]:
        """Shape of the leading axes of the kernel's variable over which loops run."""
        return tuple(self.loops[depth] for depth in self.stacked)


class Product(NamedTuple):
    """A product of activations, such as that of queries and keys.

    Attributes:
        key: its equation.
        operands: places at which its operands are read, see `Site.data`. The first one is the
            result of another such product where one of them is, as the probabilities of attention
            are.
        loops: lengths of the loops around it, from the outermost inwards.
        macs: multiply-accumulates of one call.
        inputs: number of values of each operand in one call.
        depth: largest number of sites between the inputs and this product.
        nearest: sites that reach it without another site in between.
    """

    key: Key
    operands: tuple[Place, Place]
    loops: tuple[int, ...]
    macs: int
    inputs: tuple[int, int]
    depth: int
    nearest: frozenset[int]


class Uncovered(NamedTuple):
    """A product that is neither a site nor a product of activations.

    Attributes:
        key: its equation.
        scope: names under which the model calls it.
        macs: multiply-accumulates of all its calls; 0: they are not known.
        reason: why it is not covered, as the end of a sentence.
    """

    key: Key
    scope: str
    macs: int
    reason: str


class Step(NamedTuple):
    """An equation outside of loops: the numbers of the values that it reads and writes."""

    key: Key
    scope: str
    reads: tuple[int, ...]
    writes: tuple[Value, ...]


class Sites(NamedTuple):
    """The products of a program, in the order in which it computes them.

    Attributes:
        sites: those of parameters and data.
        products: those of two activations.
        uncovered: those that cannot be quantized.
        norms: path of the norm with running statistics that reads a site's result, by site.
        outputs: place of each site's result after its bias.
        norm_outputs: place of each site's result after its bias and the norm behind it.
        last: sites from which the outputs are reached without another site.
        moments: places of the batch statistics that update each running statistic, by its path.
        steps: the equations.
        arguments: what is known of the arguments of the program.
        results: what is known of the results of the program.
    """

    sites: tuple[Site, ...]
    products: tuple[Product, ...]
    uncovered: tuple[Uncovered, ...]
    norms: dict[int, str]
    outputs: dict[int, Place]
    norm_outputs: dict[int, Place]
    last: frozenset[int]
    moments: dict[str, list[Place]]
    steps: tuple[Step, ...]
    arguments: tuple[Value, ...]
    results: tuple[Value, ...]


def scope_output(sites: Sites, scope: str) -> Place | None:
    """Finds what a named part of the program returns; None: nothing, or only statistics."""

    def inside(step: Step) -> bool:
        return step.scope == scope or step.scope.startswith(f"{scope}/")

    read = {number for step in sites.steps if not inside(step) for number in step.reads}
    read.update(value.number for value in sites.results if value.running is None)
    written = [value for step in sites.steps if inside(step) for value in step.writes]
    return next((value.place for value in reversed(written) if value.number in read), None)
