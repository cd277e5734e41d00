"""Rules that tie the tensors of a published checkpoint to the leaves of a parameter tree, in both directions.

A table is a list of `Rule(pattern, path, transform)`. `pattern` is a tensor name of the checkpoint and `path` a
leaf of the tree ("a/b/kernel"); a word in braces stands for a whole number, the same one on both sides:

    Rule("decoder.up_blocks.{stage}.upsamplers.0.time_conv.bias", "decoder/up_{stage}/upsample/time_conv/bias")

`{layer}` stands only in the pattern: it is the index on axis 0 of a stacked leaf, which takes one tensor a layer:

    Rule("blocks.{layer}.attn1.to_q.weight", "blocks/self_attn/q/kernel", LINEAR)

Because rules can be read backwards, the abstract tree says exactly which tensors a checkpoint must hold, and
with which shapes; a checkpoint is compared with that list before a byte of data is read. Two rules with one path
are two spellings of one tensor: a checkpoint has exactly one of them, and the first is the one that is written.

Axes of the transforms: o outputs · i inputs · t h w kernel time, height, width · c channels · d model width.
"""

import difflib
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from einops import rearrange

from jvdiff.errors import CheckpointError, MissingTensor, ShapeMismatch

Tree = Mapping[str, Any]  # nested dict; leaves have .shape and .dtype
_log = logging.getLogger(__name__)
_BLOCK = 256  # numbers on each side of what is rearranged at once


@dataclass(frozen=True)
class Transform:
    """A rearrangement of axes in einops notation: left to right into the tree, right to left out of it.

    source: axes in the checkpoint
    target: axes in the tree
    sizes: of axes that are one product with others in the tree
    swapped: the halves of the checkpoint's first axis change places
    all_zero: what is wrong if every number is 0, where that can be told; else empty
    """

    source: str
    target: str
    sizes: tuple[tuple[str, int], ...] = ()
    all_zero: str = ""
    swapped: bool = False

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Checkpoint layout -> parameter layout (a view where numpy can give one)."""
        return rearrange(self._halves(array), f"{self.source} -> {self.target}", **dict(self.sizes))

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Parameter layout -> checkpoint layout (a view where numpy can give one)."""
        return self._halves(rearrange(array, f"{self.target} -> {self.source}", **dict(self.sizes)))

    def _halves(self, array: np.ndarray) -> np.ndarray:
        return np.roll(array, len(array) // 2, axis=0) if self.swapped else array

    def cut(self, index: Sequence[slice]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """For a part of the leaf: (what to read of the tensor, what to keep of that once it is rearranged).

        Axes that the tensor has too are cut as they are read; one that is made of several axes, afterwards.
        """
        if self.swapped:  # a small tensor
            return (slice(None),) * len(index), tuple(index)
        if self.source == "...":
            return tuple(index), (slice(None),) * len(index)
        axes = dict(zip(re.findall(r"\(.*?\)|\S+", self.target), index, strict=True))
        names = self.source.split()
        read = tuple(axes.get(name, slice(None)) for name in names)
        return read, tuple(slice(None) if name in names else part for name, part in axes.items())

    def source_shape(self, target_shape: Sequence[int]) -> tuple[int, ...]:
        """The checkpoint's shape of a leaf, without data."""
        return self.inverse(np.broadcast_to(np.int8(0), tuple(target_shape))).shape


IDENTITY = Transform("...", "...")
LINEAR = Transform("o i", "i o")  # torch stores [out, in]
CONV_3D = Transform("o i t h w", "t h w i o")
CONV_2D = Transform("o i h w", "h w i o")
CONV_TIME = Transform("o i t 1 1", "t i o")  # kernel (3, 1, 1)
CONV_1X1X1 = Transform("o i 1 1 1", "i o")
CONV_1X1 = Transform("o i 1 1", "i o")
GAMMA_VIDEO = Transform("c 1 1 1", "c")
GAMMA_IMAGE = Transform("c 1 1", "c")
MODULATION = Transform("1 m d", "m d")  # m: the shifts, scales and gates


def patch(t: int, h: int, w: int) -> Transform:
    """A Conv3d with kernel = stride = (t, h, w) as one matrix."""
    return Transform("d c t h w", "(c t h w) d", (("t", t), ("h", h), ("w", w)))


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    pattern: tensor name in the checkpoint; {layer} is the number of a stacked layer, and other names in braces are
        numbers that `path` has too
    path: leaf in the tree
    transform: how the axes move between them
    """

    pattern: str
    path: str
    transform: Transform = IDENTITY

    def match(self, path: str) -> dict[str, str] | None:
        """The numbers in a leaf's path, or None if the rule is about other leaves."""
        words = re.split(r"\{(\w+)\}", self.path)
        regex = "".join(f"(?P<{w}>[0-9]+)" if i % 2 else re.escape(w) for i, w in enumerate(words))
        found = re.fullmatch(regex, path)
        return found and found.groupdict()


class Entry(NamedTuple):
    """What one tensor of the checkpoint must be, and where it goes.

    shape: in the checkpoint
    path: leaf in the tree
    layer: which part of the leaf's axis 0 it fills; None: the whole leaf
    transform: how the axes move between them
    """

    shape: tuple[int, ...]
    path: str
    layer: int | None
    transform: Transform


class Source(Protocol):
    """Anything that holds named tensors: `tensors[name]` has a shape and dtype, `read(name)` gives the array.

    `read(name, index)` gives a part of it: one slice for each axis.
    """

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def read(self, name: str, index: Sequence[slice] | None = None) -> np.ndarray: ...


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a/b/kernel": leaf}, in the tree's order."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, path + "/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/kernel": leaf} -> nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, key = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = leaf
    return tree


def _spellings(rules: Sequence[Rule], path: str, shape: Sequence[int]) -> list[dict[str, Entry]]:
    """The tensors that fill one leaf, once for each rule about it."""
    spellings = []
    for rule in rules:
        numbers = rule.match(path)
        if numbers is None:
            continue
        if "{layer}" in rule.pattern:
            one = rule.transform.source_shape(shape[1:])
            names = {rule.pattern.format(layer=i, **numbers): i for i in range(shape[0])}
        else:
            one = rule.transform.source_shape(shape)
            names = {rule.pattern.format(**numbers): None}
        spellings.append({name: Entry(one, path, layer, rule.transform) for name, layer in names.items()})
    if not spellings:
        raise LookupError(f"no rule is about the leaf {path!r}")
    return spellings


def expected(rules: Sequence[Rule], abstract: Tree, found: Mapping[str, Any] | None = None) -> dict[str, Entry]:
    """Every tensor that a checkpoint of this model holds, from the abstract tree alone.

    Where a leaf has two spellings, those are listed of which `found` has a tensor; the first if it has none.
    Mistakes in a table raise LookupError (a leaf without a rule) or ValueError (a name that two leaves claim).
    """
    entries: dict[str, Entry] = {}
    for path, leaf in flatten(abstract).items():
        spellings = _spellings(rules, path, leaf.shape)
        present = [s for s in spellings if found is not None and any(name in found for name in s)]
        for spelling in present or spellings[:1]:
            for name, entry in spelling.items():
                if name in entries:
                    raise ValueError(f"two leaves claim the tensor {name!r}: {entries[name].path}, {path}")
                entries[name] = entry
    return entries


def shown(name: str) -> str:
    """A tensor name from a file, quoted, escaped and cut short, so that it cannot spoil a terminal or a log."""
    return ascii(name) if len(name) <= 120 else f"{name[:120]!a}... ({len(name)} characters)"


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def listed(problems: Sequence[str], most: int = 10) -> str:
    """The first few problems on one line, and how many more there are."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def is_ignored(name: str, ignored: Sequence[str]) -> bool:
    """Whether a regular expression of `ignored` is about the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in ignored)


def check(
    rules: Sequence[Rule],
    abstract: Tree,
    source: Source,
    *,
    where: str = "checkpoint",
    ignored: Sequence[str] = (),
) -> dict[str, Entry]:
    """Compares names and shapes with the abstract tree, before any data is read; gives the list of `expected`.

    One message tells of every problem, the first ten of each kind by name. `ignored` are regular expressions of whole
    names: published tensors that nobody uses. They are counted in one line of the log, and written back by nothing.

    Raises:
        MissingTensor: tensors missing, not expected, or given under two names.
        ShapeMismatch: only shapes differ.
    """
    found = source.tensors
    entries = expected(rules, abstract, found)

    missing = [name for name in entries if name not in found]
    rest = [name for name in found if name not in entries]
    unused = [name for name in rest if is_ignored(name, ignored)]
    unexpected = [name for name in rest if name not in unused]
    places: dict[tuple[str, int | None], list[str]] = {}
    for name, entry in entries.items():
        places.setdefault((entry.path, entry.layer), []).append(name)
    twice = [" and ".join(map(shown, names)) for names in places.values() if len(names) > 1]
    shapes = [
        f"{shown(name)} is {_shape(found[name].shape)}, expected {_shape(entry.shape)}"
        for name, entry in entries.items()
        if name in found and tuple(found[name].shape) != entry.shape
    ]
    if not (missing or unexpected or twice or shapes):
        if unused:
            _log.info("%s: %d tensors are not used: %s", where, len(unused), listed([shown(name) for name in unused]))
        return entries

    def hint(name: str) -> str:
        near = difflib.get_close_matches(name[:200], missing, n=1, cutoff=0.8)
        return f"{shown(name)} (near {near[0]!r})" if near else shown(name)

    hints = [hint(name) for name in unexpected[:10]] + unexpected[10:]
    total = len(missing) + len(unexpected) + len(twice) + len(shapes)
    lines = [f"{where}: {total} of its tensors do not fit the model that its config.json describes."]
    lines += [f"  missing ({len(missing)}): {listed([shown(name) for name in missing])}"] if missing else []
    lines += [f"  not expected ({len(unexpected)}): {listed(hints)}"] if unexpected else []
    lines += [f"  given twice ({len(twice)}): {listed(twice)}"] if twice else []
    lines += [f"  wrong shape ({len(shapes)}): {listed(shapes)}"] if shapes else []
    lines += ["Take weights and config.json from one and the same Diffusers repository, complete and unchanged."]
    raise (MissingTensor if missing or unexpected or twice else ShapeMismatch)("\n".join(lines))


def by_leaf(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Leaf path -> the tensors that fill it."""
    leaves: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        leaves.setdefault(entry.path, {})[name] = entry
    return leaves


def fill(
    shape: Sequence[int],
    dtype: Any,
    entries: Mapping[str, Entry],
    source: Source,
    *,
    index: Sequence[slice] | None = None,
    where: str = "checkpoint",
) -> np.ndarray:
    """Reads one leaf, or the part `index` of it (a slice for each axis); holds that, and as much of one source tensor.

    Raises CheckpointError where a finite number does not fit the wanted dtype (float16), where a tensor that must
    not be all zero is, and what `source` raises.
    """
    spans = [s.indices(n)[:2] for s, n in zip(index or [slice(None)] * len(shape), shape, strict=True)]
    array = np.empty([stop - start for start, stop in spans], dtype)
    for name, entry in entries.items():
        place, part = array, [slice(*span) for span in spans]
        if entry.layer is not None:
            if entry.layer not in range(*spans[0]):
                continue
            place, part = array[entry.layer - spans[0][0]], part[1:]
        read, keep = entry.transform.cut(part)
        tensor = source.read(name) if array.shape == tuple(shape) else source.read(name, read)
        if entry.transform.all_zero and not _any(tensor) and not _any(source.read(name)):
            raise CheckpointError(f"{where}: {shown(name)}: {entry.transform.all_zero}")
        _copy(place, entry.transform.forward(tensor)[keep])
        check_cast(name, tensor, place, where)
    return array


def _any(array: np.ndarray) -> bool:
    return any(row.any() for row in array)  # row by row: ends at once, and makes no second array of that size


def _copy(place: np.ndarray, source: np.ndarray) -> None:
    """place[...] = source. A block is cast as it lies in memory, and rearranged within the processor's cache: numpy
    itself would do both number by number."""
    with np.errstate(over="ignore"):
        if place.ndim < 2:
            place[...] = source
            return
        for i, j in itertools.product(*(range(0, n, _BLOCK) for n in place.shape[-2:])):
            block = np.s_[..., i : i + _BLOCK, j : j + _BLOCK]
            place[block] = source[block].astype(place.dtype, copy=False)


def check_cast(name: str, tensor: np.ndarray, cast: np.ndarray, where: str) -> None:
    """Raises CheckpointError where a finite number of a tensor does not fit the dtype that it was cast to (float16)."""
    lost = count_nonfinite(cast) if tensor.dtype != cast.dtype else 0
    if lost and lost > count_nonfinite(tensor):
        raise CheckpointError(
            f"{where}: {shown(name)} holds values too large for {cast.dtype}.\nChoose bfloat16 or float32."
        )


def count_nonfinite(array: np.ndarray) -> int:
    """How many numbers are NaN or infinite, in pieces, so that no second array of that size is made."""
    flat, total = array.reshape(-1), 0
    for start in range(0, flat.size, 2**20):
        piece = flat[start : start + 2**20]
        if array.dtype.itemsize == 2:
            mask = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)  # the exponent, all ones
            total += np.count_nonzero((piece.view(np.uint16) & mask) == mask)
        else:
            total += piece.size - np.count_nonzero(np.isfinite(piece))
    return int(total)


def stream(
    rules: Sequence[Rule],
    abstract: Tree,
    source: Source,
    *,
    where: str = "checkpoint",
    ignored: Sequence[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """Fills the tree leaf by leaf: (path, array of the abstract leaf's shape and dtype), after `check`."""
    leaves = by_leaf(check(rules, abstract, source, where=where, ignored=ignored))
    for path, leaf in flatten(abstract).items():
        yield path, fill(leaf.shape, leaf.dtype, leaves[path], source, where=where)


def assemble(rules: Sequence[Rule], abstract: Tree, source: Source, *, where: str = "checkpoint") -> dict[str, Any]:
    """The whole tree as numpy arrays of the abstract tree's shapes and dtypes; errors as in `stream`."""
    return unflatten(dict(stream(rules, abstract, source, where=where)))


def disassemble(rules: Sequence[Rule], tree: Tree) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `assemble`: (tensor name, array in the checkpoint's layout), one at a time."""
    leaves = flatten(tree)
    for name, entry in expected(rules, tree).items():
        leaf = np.asarray(leaves[entry.path] if entry.layer is None else leaves[entry.path][entry.layer])
        yield name, np.ascontiguousarray(entry.transform.inverse(leaf)).reshape(entry.shape)
