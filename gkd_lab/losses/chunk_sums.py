"""Sums of the losses of all cells and their gradients, over chunks of tokens whose logits exist at once.

Cells whose terms are equal are computed in one batched operation: on a GPU a small student waits for the
host, which launches as many operations for one cell as for fifteen.

Shapes: K cells, k of them at once, M blocks of teacher rows, m of them at once, N tokens of a cell, n of them
in a chunk, V vocabulary, H width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_lab.losses.cell_losses import LossArguments
from gkd_lab.losses.loss import LabelLoss, TeacherLoss
from gkd_lab.losses.teacher_targets import LogitReader, TeacherTarget, project_hidden
from gkd_lab.losses.terms import WeightedLoss
from gkd_lab.models.projection import MatmulPrecision, Projection

CHUNK_BYTES = 128 * 2**20
"""Memory of a chunk's logits on a CPU, of students and teachers together."""
DEVICE_CHUNK_BYTES = 2**30
"""The same on a GPU, which notices that each chunk reads the heads again: 880 tokens at V = 151,936."""
SLICE_BYTES = 2**20
"""Memory of the logits that a CPU turns into gradients at once, so that temporaries stay in its cache."""
MIN_CHUNK_TOKENS = 128
"""Blocks, then cells, are taken one after another rather than all at once in chunks of fewer tokens."""

Index = slice | Tensor
"""Selects cells, blocks or tokens along their axis: a slice (a view) or their numbers."""
CellTerms = tuple[tuple[int, WeightedLoss], ...]
"""(number, term) of the terms that are computed from logits."""


def build_index(numbers: Sequence[int], device: torch.device) -> Index:
    """Return what selects ascending or equal numbers of an axis: a slice, for a view, if it can, or a tensor.

    Equal numbers become a slice of length 1, which is broadcast.
    """
    first = numbers[0]
    stride = numbers[1] - first if len(numbers) > 1 else 1
    if stride == 0 and len(set(numbers)) == 1:
        return slice(first, first + 1)
    if stride > 0 and list(numbers) == [first + stride * n for n in range(len(numbers))]:
        return slice(first, numbers[-1] + 1, stride)
    return torch.tensor(numbers, device=device)


def write_rows(tensor: Tensor, cells: Index, rows: Index, values: Tensor) -> None:
    """Set tensor[cells, rows] to the values, (k, n, ...)."""
    if isinstance(cells, slice):
        tensor[cells][:, rows] = values
    else:
        numbers = (
            rows if isinstance(rows, Tensor) else torch.arange(tensor.shape[1], device=tensor.device)[rows]
        )
        tensor[cells[:, None], numbers] = values


@dataclass(frozen=True)
class Part:
    """Blocks of teacher rows that are read at once, the cells that read them, and the chunks of tokens.

    cell_sets: sets of cells, ascending; the logits of a set's cells exist at once.
    """

    cell_sets: tuple[tuple[int, ...], ...]
    chunks: Sequence[Index]


def takes_all_blocks(device: torch.device) -> bool:
    """Return whether blocks that end at different tokens are computed at once, with some tokens for nothing.

    Not on a CPU, which would wait for these tokens; there the rounding of a block depends on no other.
    """
    return device.type != "cpu"


def plan_parts(arguments: LossArguments, vocabulary: int, dtype: torch.dtype) -> list[Part]:
    """Return the parts in which the losses are computed, such that each chunk's logits fit into memory.

    All blocks at once with all cells if that leaves enough tokens to a chunk, else block by block, else also
    cell by cell. Without `arguments.lengths` block by block, with the tokens that any cell is trained on.
    """
    weights, lengths = arguments.weights, arguments.lengths
    cells_of_block: dict[int, list[int]] = {}
    for cell, block in enumerate(arguments.block_of_cell):
        cells_of_block.setdefault(block, []).append(cell)
    chunk_bytes = CHUNK_BYTES if weights.device.type == "cpu" else DEVICE_CHUNK_BYTES
    planner = _PartPlanner(chunk_bytes // (vocabulary * dtype.itemsize), max(1, len(arguments.teachers)))
    if lengths is not None and takes_all_blocks(weights.device):
        all_cells = tuple(range(len(arguments.block_of_cell)))
        size = planner.count_tokens(len(cells_of_block), len(all_cells), max(lengths))
        if size is not None:
            return [Part((all_cells,), _split_tokens(max(lengths), size))]
    parts: list[Part] = []
    for block, cells in cells_of_block.items():
        if lengths is None:
            trained = weights[cells].ne(0).any(0).nonzero()[:, 0]
            cell_sets, size = planner.split_cells(cells, len(trained))
            parts.append(Part(cell_sets, trained.split(size) if len(trained) else ()))
        else:
            cell_sets, size = planner.split_cells(cells, lengths[block])
            parts.append(Part(cell_sets, _split_tokens(lengths[block], size)))
    return [part for part in parts if part.chunks]


def _split_tokens(count: int, size: int) -> list[slice]:
    """Return slices of `size` tokens each that cover the first `count`; the last may be shorter."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


@dataclass(frozen=True)
class _PartPlanner:
    """Sizes of chunks for `budget` tokens' logits in memory, those of `teachers` teachers included."""

    budget: int
    teachers: int

    def count_tokens(self, blocks: int, cells: int, tokens: int) -> int | None:
        """Return the size of a chunk of so many blocks and cells at once; None if it would be too small."""
        size = self.budget // (self.teachers * blocks + cells)
        return size if size >= max(1, min(tokens, MIN_CHUNK_TOKENS)) else None

    def split_cells(self, cells: Sequence[int], tokens: int) -> tuple[tuple[tuple[int, ...], ...], int]:
        """Return the sets of a block's cells that are computed at once, and the size of a chunk."""
        size = self.count_tokens(1, len(cells), tokens)
        if size is not None:
            return (tuple(cells),), size
        return tuple((cell,) for cell in cells), max(self.budget // (self.teachers + 1), 1)


class TeacherReaders:
    """Reads the teachers' logits chunk by chunk, in the arithmetic of the context that creates it."""

    def __init__(
        self, arguments: LossArguments, vocabulary: int, dtype: torch.dtype, parts: Sequence[Part]
    ) -> None:
        self.arguments, self.device = arguments, arguments.weights.device
        max_rows = max((self._count_rows(part) for part in parts), default=1)
        self.readers: dict[int, LogitReader] = {
            number: teacher.create_reader(vocabulary, dtype, max_rows)
            for number, teacher in arguments.teachers.items()
        }

    def _count_rows(self, part: Part) -> int:
        """Return the most tokens of a chunk of all the part's blocks."""
        blocks = {self.arguments.block_of_cell[cell] for cells in part.cell_sets for cell in cells}
        return len(blocks) * max(count_rows(rows) for rows in part.chunks)

    def read_targets(
        self, blocks: Sequence[int], rows: Index, targets: Iterable[TeacherTarget]
    ) -> dict[TeacherTarget, Tensor]:
        """Return target -> logits (m, n, V) of these blocks; each teacher is read once."""
        logits: dict[int, Tensor] = {}
        index = build_index(blocks, self.device)

        def read_teacher(number: int) -> Tensor:
            """Return a teacher's logits (m, n, V) at these rows, computed at its first use."""
            if number not in logits:
                logits[number] = self.readers[number](index, rows)
            return logits[number]

        routes = self.arguments.routes
        routes = None if routes is None else routes[index][:, rows]
        return {target: target.combine_logits(read_teacher, routes) for target in targets}


def count_rows(rows: Index) -> int:
    """Return how many tokens a chunk has."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


@dataclass(frozen=True)
class CellGroup:
    """Cells of one chunk whose terms are equal.

    numbers: of the cells. cells, positions: select them among all cells and among those of the chunk.
        blocks: selects each one's block among the blocks of the chunk.
    """

    numbers: tuple[int, ...]
    cells: Index
    positions: Index
    blocks: Index
    terms: CellTerms


class ChunkSums:
    """Sums over cells and chunks of tokens, and a buffer for the students' logits of a chunk.

    Args:
        student: (K, N, H) hidden states. head: Their head, without a cell axis if K = 1.
        needs_gradient: Of hidden states, the head's weight and its bias.

    Attributes:
        entropies: (K,). terms: (K, most terms of a cell), each term's part of the loss.
        gradients: Of hidden states, weight and bias; None where not needed.
    """

    def __init__(
        self,
        student: Tensor,
        head: Projection,
        arguments: LossArguments,
        needs_gradient: Sequence[bool],
        arithmetic: MatmulPrecision,
        vocabulary: int,
    ) -> None:
        self.student, self.arguments, self.arithmetic = student, arguments, arithmetic
        self.vocabulary, self.device = vocabulary, student.device
        self.head = arithmetic.convert_head(head.add_cell_axis().truncate_vocabulary(vocabulary))
        wide = arithmetic.result_dtype
        weights = arguments.weights.to(wide)
        self.weights = torch.stack([(weights > 0).to(wide), weights])  # of entropies, of losses
        self.term_lists = [tuple(arguments.logit_terms(cell)) for cell in range(len(student))]
        # Terms of equal loss, weight and teachers, scaled or not, are computed at once.
        self.kinds = [
            (terms, tuple((cell, number) in arguments.scales for number, _ in terms))
            for cell, terms in enumerate(self.term_lists)
        ]
        max_terms = max(len(terms) for terms in arguments.terms)
        self.totals = student.new_zeros(1 + max_terms, len(student), dtype=wide)
        self.gradients = [
            torch.zeros_like(tensor, dtype=wide) if needed and tensor is not None else None
            for needed, tensor in zip(needs_gradient, (student, head.weight, head.bias), strict=True)
        ]
        self.is_differentiated = any(gradient is not None for gradient in self.gradients)
        self.parts = plan_parts(arguments, vocabulary, wide)
        rows_of_parts = [len(part.cell_sets[0]) * max(map(count_rows, part.chunks)) for part in self.parts]
        self.logits_buffer = student.new_empty(max(rows_of_parts, default=0) * vocabulary, dtype=wide)

    @property
    def entropies(self) -> Tensor:
        """Each cell's entropy, summed over its tokens with a weight above 0, (K,)."""
        return self.totals[0]

    @property
    def terms(self) -> Tensor:
        """Each term's part of each cell's loss, (K, most terms of a cell)."""
        return self.totals[1:].T

    def add_part(self, part: Part, readers: TeacherReaders) -> None:
        """Add the losses and gradients of a part; each chunk of its teachers is read once."""
        for rows in part.chunks:
            cell_sets = [self._select_active(cells, rows) for cells in part.cell_sets]
            cells_of_chunk = [cell for cells in cell_sets for cell in cells]
            if not cells_of_chunk:
                continue
            blocks = sorted({self.arguments.block_of_cell[cell] for cell in cells_of_chunk})
            terms = [term for cell in cells_of_chunk for _, term in self.term_lists[cell]]
            distinct = dict.fromkeys(term.target for term in terms if isinstance(term.loss, TeacherLoss))
            targets = readers.read_targets(blocks, rows, distinct)
            for cells in filter(None, cell_sets):
                self._add_chunk(cells, blocks, rows, targets)

    def _select_active(self, cells: tuple[int, ...], rows: Index) -> tuple[int, ...]:
        """Return those of the cells that are trained on a token of the chunk or on a later one."""
        lengths = self.arguments.lengths
        if lengths is None or isinstance(rows, Tensor):
            return cells
        blocks = self.arguments.block_of_cell
        return tuple(cell for cell in cells if lengths[blocks[cell]] > rows.start)

    def _add_chunk(
        self,
        cells: tuple[int, ...],
        blocks: Sequence[int],
        rows: Index,
        targets: Mapping[TeacherTarget, Tensor],
    ) -> None:
        """Add the losses and gradients of the cells' tokens `rows` to the sums."""
        index = build_index(cells, self.device)
        hidden, head = self.student[index][:, rows], self.head.select_cells(index)
        raw = project_hidden(hidden, head, self.vocabulary, self.arithmetic, self.logits_buffer)
        for group in self._list_groups(cells, blocks):
            part = raw[group.positions]
            self._replace_logits_by_gradient(group, part, rows, targets)
            if self.is_differentiated and isinstance(group.positions, Tensor):
                raw[group.positions] = part
        if self.is_differentiated:
            self._add_parameter_gradients(index, rows, hidden, head, raw)

    def _list_groups(self, cells: tuple[int, ...], blocks: Sequence[int]) -> Iterator[CellGroup]:
        """Yield the groups of a chunk's cells whose terms are equal."""
        positions_of_kind: dict[object, list[int]] = {}
        for position, cell in enumerate(cells):
            positions_of_kind.setdefault(self.kinds[cell], []).append(position)
        for positions in positions_of_kind.values():
            members = [cells[position] for position in positions]
            places = [blocks.index(self.arguments.block_of_cell[cell]) for cell in members]
            yield CellGroup(
                tuple(members),
                build_index(members, self.device),
                build_index(positions, self.device),
                build_index(places, self.device),
                self.term_lists[members[0]],
            )

    def _replace_logits_by_gradient(
        self, group: CellGroup, raw: Tensor, rows: Index, targets: Mapping[TeacherTarget, Tensor]
    ) -> None:
        """Add the loss of a group's tokens `rows`; overwrite `raw`, h W^T + b, (k, n, V), with its gradient.

        Nothing is written if no gradient is needed.
        """
        count, size = raw.shape[1], raw.shape[1]
        if raw.device.type == "cpu":
            size = max(SLICE_BYTES // (len(raw) * raw.shape[2] * raw.element_size()), 1)
        weights = self.weights[:, group.cells][:, :, rows]
        for first in range(0, count, size):
            places = slice(first, min(first + size, count))
            part, slice_weights = raw[:, places], weights[:, :, places]
            logits = self.head.scale_and_cap(part)
            slice_targets = {
                term.target: targets[term.target][group.blocks][:, places]
                for _, term in group.terms
                if isinstance(term.loss, TeacherLoss)
            }
            gradient = self._add_term_values(
                group, logits, _select_rows(rows, places), slice_targets, slice_weights
            )
            if self.is_differentiated:
                gradient = self.head.compute_raw_gradient(gradient, logits)
                torch.mul(gradient, slice_weights[1, ..., None], out=part)

    def _add_term_values(
        self,
        group: CellGroup,
        logits: Tensor,
        rows: Index,
        targets: Mapping[TeacherTarget, Tensor],
        weights: Tensor,
    ) -> Tensor:
        """Add all terms' values at the tokens `rows`; return their gradient by the logits, (k, n, V).

        The gradient has the terms' weights and scales, not yet the tokens' weights. weights: (2, k, n), of
        the entropies and of the values.
        """
        total: Tensor | None = None
        columns: list[Tensor] = []  # entropies, then each term's values
        for number, term in group.terms:
            values, gradient, entropies = self._evaluate_term(group, term, logits, rows, targets)
            factors = self._read_scales(group, number, rows)
            if factors is not None:
                factors = factors.to(values.dtype)
                values, gradient = values * factors, gradient.mul_(factors[..., None])
            if term.weight != 1:
                values, gradient = term.weight * values, gradient.mul_(term.weight)
            columns += [values] if columns else [entropies, values]
            total = gradient if total is None else total.add_(gradient)
        assert total is not None, "a loss has a term"
        if len(group.terms) > 1:
            weights = torch.cat([weights[:1], weights[1:].expand(len(group.terms), -1, -1)])
        sums = torch.stack(columns).mul_(weights).sum(-1)
        numbers = build_index([0, *(1 + number for number, _ in group.terms)], self.device)
        if isinstance(numbers, slice) and isinstance(group.cells, slice):
            self.totals[numbers][:, group.cells].add_(sums)
        else:
            write_rows(self.totals, numbers, group.cells, self.totals[numbers][:, group.cells] + sums)
        return total

    def _read_scales(self, group: CellGroup, number: int, rows: Index) -> Tensor | None:
        """Return the factors on the weights of a term's tokens, (k, n), or None if it has none."""
        scales = [self.arguments.scales.get((cell, number)) for cell in group.numbers]
        present = [scale for scale in scales if scale is not None]
        return torch.stack(present)[:, rows] if present else None

    def _evaluate_term(
        self,
        group: CellGroup,
        term: WeightedLoss,
        logits: Tensor,
        rows: Index,
        targets: Mapping[TeacherTarget, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a term's values, (k, n), gradient, (k, n, V), and entropies, (k, n), all before weights."""
        loss = term.loss
        assert isinstance(loss, TeacherLoss | LabelLoss)
        if isinstance(loss, TeacherLoss):
            references = targets[term.target]
        elif self.arguments.labels is None:
            # The term has weight 0 and gives the entropy alone: any labels will do.
            references = logits.new_zeros(logits.shape[:2], dtype=torch.long)
        else:
            references = self.arguments.labels[group.cells][:, rows]
        if loss.takes_cell_axis:
            return loss.value_and_gradient(logits, references)
        references = references.expand(len(logits), *references.shape[1:])
        values, gradient, entropies = loss.value_and_gradient(logits.flatten(0, 1), references.flatten(0, 1))
        shape = logits.shape[:2]
        return values.view(shape), gradient.view_as(logits), entropies.view(shape)

    def _add_parameter_gradients(
        self, cells: Index, rows: Index, hidden: Tensor, head: Projection, raw: Tensor
    ) -> None:
        """Add a chunk's gradients of hidden states, weight and bias, where needed, to the sums.

        raw: the gradient by h W^T + b, (k, n, V). head: that of these cells.
        """
        hidden_gradient, weight_gradient, bias_gradient = self.gradients
        if bias_gradient is not None:
            bias_rows = bias_gradient.view(-1, bias_gradient.shape[-1])[:, : self.vocabulary]
            _add_cells(bias_rows, cells, raw.sum(1))
        if head.weight is None:
            if hidden_gradient is not None:
                write_rows(hidden_gradient[..., : self.vocabulary], cells, rows, raw)
            return
        total = torch.empty_like(hidden, dtype=raw.dtype)
        for number, span in enumerate(self.arithmetic.split_rows(head.weight)):
            if hidden_gradient is not None:
                self.arithmetic.multiply(raw[..., span], head.weight[:, span], total, accumulate=number > 0)
            if weight_gradient is not None:
                of_cells = weight_gradient.view(-1, *weight_gradient.shape[-2:])[:, : self.vocabulary][
                    :, span
                ]
                if isinstance(cells, slice):
                    self.arithmetic.multiply(raw[..., span].mT, hidden, of_cells[cells], accumulate=True)
                else:
                    part = raw.new_empty(len(raw), of_cells.shape[1], hidden.shape[-1])
                    self.arithmetic.multiply(raw[..., span].mT, hidden, part)
                    _add_cells(of_cells, cells, part)
        if hidden_gradient is not None:
            write_rows(hidden_gradient, cells, rows, total)


def _add_cells(tensor: Tensor, cells: Index, values: Tensor) -> None:
    """Add the values, (k, ...), to the tensor, (K, ...), at these cells, in place."""
    if isinstance(cells, slice):
        tensor[cells].add_(values)
    else:
        tensor.index_add_(0, cells, values)


def _select_rows(rows: Index, places: slice) -> Index:
    """Return the tokens at these places of a chunk."""
    if isinstance(rows, slice):
        return slice(rows.start + places.start, rows.start + places.stop)
    return rows[places]
