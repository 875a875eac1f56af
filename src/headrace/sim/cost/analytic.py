"""The roofline cost model: every operator takes as long as its arithmetic or its bytes, whichever is longer.

    step = passes x sum over operators of max(FLOPs / peak, bytes / bandwidth) + collectives + launches + host

What depends on the tokens of a step alone (all matrix products, experts, collectives) is priced once per token count
and remembered; attention is a few multiply-adds. So a step costs microseconds, however many operators there are.
Owns that memory, bounded; otherwise pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import ceil
from operator import add

from headrace.sim.cost.batch import Batch, Line, Spans, StepCost, trace_line
from headrace.sim.cost.conventions import HEADRACE, Convention, Overlap
from headrace.sim.cost.network import Transfer, collective, exchange, point_to_point
from headrace.sim.cost.operators import Attention, Demand, Machine
from headrace.sim.cost.placement import Placement
from headrace.sim.hardware import Link

MOST_REMEMBERED = 1 << 16  # token counts

# Shares of the power above idle that each unit draws at full use (GenZ's 40, 20 and 10 % beside 30 % static)
COMPUTE_POWER, MEMORY_POWER, NETWORK_POWER = 4 / 7, 2 / 7, 1 / 7


# What a part of a step asks of one device. A tuple, added up in the hot path:
# (compute-bound seconds, memory-bound seconds, seconds of arithmetic, FLOPs, bytes, network seconds, network bytes)
_Part = tuple[float, float, float, float, float, float, float]


# An attention operator in all its layers: its window, whether masked pairs count, and five coefficients each of
# (pair, key, query): seconds of arithmetic per pair and key; seconds of memory per pair, key and query; FLOPs per pair
# and key; bytes per pair, key and query.
_Attention = tuple[int | None, bool, float, float, float, float, float, float, float, float, float, float]


class Analytic:
    """Prices batches for one placement. `host_s` is what the host adds to every step; measure it, it is not derived.

    Costs are those of the convention; see `conventions`. With several stages, `parallel.microbatches` follow each
    other through them; a step lasts (stages + microbatches - 1) / stages passes over all layers.
    """

    def __init__(
        self,
        placement: Placement,
        convention: Convention = HEADRACE,
        *,
        host_s: float = 0.0,
        overlap: Overlap | None = None,
    ) -> None:
        self.placement = placement
        self.convention = convention if overlap is None else replace(convention, overlap=overlap)
        self.host_s = host_s
        device, parallel = placement.device, placement.parallel
        self._machine = Machine(
            device.memory_bytes_per_s * convention.memory_share,
            convention.onchip_bytes_per_s,
            convention.decode_on_chip,
            convention.prefill_on_chip,
            convention.scores_on_chip,
            convention.idle_without_flops,
        )
        dense, attention = convention.operators(placement, convention)
        self._tokens = tuple(operator for operator in dense if not operator.sampled)
        self._sampled = tuple(operator for operator in dense if operator.sampled)
        self._attention = attention
        self._prefill = tuple(self._compiled(operator) for operator in attention if not operator.decode)
        self._decode = tuple(self._compiled(operator) for operator in attention if operator.decode)
        self._network = _network(placement, convention)
        self._split = parallel.microbatches
        self._passes = (parallel.pipeline + self._split - 1) / parallel.pipeline
        self._launch_s = convention.layer_overhead_s * placement.shape.layers * self._passes + host_s
        self._static_w = device.static_w * parallel.devices
        self._dynamic_w = ((device.max_w or 0.0) - device.static_w) * parallel.tensor
        self._remembered: dict[tuple[float, bool], _Part] = {}
        self._heads: dict[float, _Part] = {}

    @property
    def bytes_per_s(self) -> float:
        """What the memory of one device gives."""
        return self._machine.bytes_per_s

    # ---------------------------------------------------------------------------------------------- the hot path

    def estimate(self, batch: Batch) -> StepCost:
        """The price of one step. An empty batch costs the host's time only."""
        if not batch.tokens:
            return StepCost(self._launch_s, overhead_s=self._launch_s, joules=self._launch_s * self._static_w)
        tokens, decode = batch.tokens, batch.tokens == batch.decodes
        part = self._remembered.get((tokens, decode)) or self._priced(tokens, decode)
        head = self._heads.get(batch.sampled) or self._priced_head(batch.sampled, decode)
        sums = tuple(map(add, part, head))
        if not decode:
            sums = _attended(sums, self._prefill, batch, self._split, False)
        if batch.decodes:
            sums = _attended(sums, self._decode, batch, self._split, True)
        return self._total(sums)

    def line(self, batch: Batch, steps: int) -> Line:
        """The batch and the decode steps after it that cost an affine function of their number."""
        if self.convention.overlap != "serial" or batch.tokens != batch.decodes or not batch.tokens:
            return trace_line(self, batch, steps)
        slope_s, last = 0.0, steps - 1
        queries = batch.decodes / self._split
        for op in self._decode:
            spans = batch.full if op[0] is None else batch.windowed[op[0]]
            growing, context = spans.growing / self._split, spans.decode_context / self._split
            rising, climbing = (op[2] + op[3]) * growing, (op[4] + op[5]) * growing
            gap = (op[2] + op[3] - op[4] - op[5]) * context - op[6] * queries  # compute over memory, now
            slope_s += rising if gap > 0 or (gap == 0 and rising > climbing) else climbing
            if gap * (rising - climbing) < 0:  # the lower line catches up
                last = min(last, int(gap / (climbing - rising)))
            if spans.room is not None:
                last = min(last, spans.room)
        first_s = self.estimate(batch).seconds
        return Line(first_s, self._passes * slope_s if last > 0 else 0.0, max(last, 0) + 1)

    def _total(self, part: _Part) -> StepCost:
        """One pass through all layers becomes a step of the whole replica."""
        compute_s, memory_s, busy_s, flops, nbytes, network_s, network_bytes = part
        moving_s = nbytes / self._machine.bytes_per_s
        if self.convention.overlap != "serial":
            compute_s, memory_s, network_s = self._overlapped(compute_s, memory_s, network_s, busy_s, moving_s)
        passes, split, devices = self._passes, self._split, self.placement.parallel.tensor
        seconds = passes * (compute_s + memory_s + network_s) + self._launch_s
        drawn = COMPUTE_POWER * busy_s + MEMORY_POWER * moving_s + NETWORK_POWER * part[5]
        return StepCost(
            seconds,
            passes * compute_s,
            passes * memory_s,
            passes * network_s,
            self._launch_s,
            self._static_w * seconds + self._dynamic_w * split * drawn,
            flops * split * devices,
            nbytes * split * devices,
            network_bytes * split * devices,
        )

    def _overlapped(
        self, compute_s: float, memory_s: float, network_s: float, busy_s: float, moving_s: float
    ) -> tuple[float, float, float]:
        """The three terms when some of them hide behind others; what is hidden counts zero."""
        if self.convention.overlap == "network":
            if network_s > compute_s + memory_s:
                return 0.0, 0.0, network_s
            return compute_s, memory_s, 0.0
        longest = max(busy_s, moving_s, network_s)
        if longest == busy_s:
            return busy_s, 0.0, 0.0
        return (0.0, moving_s, 0.0) if longest == moving_s else (0.0, 0.0, network_s)

    # --------------------------------------------------------------------------------------- prepared and remembered

    def _compiled(self, operator: Attention) -> _Attention:
        count, rate, machine = operator.count, operator.flops_per_s, self._machine
        onchip = machine.keeps(operator.decode)
        scores_onchip = onchip or machine.scores_on_chip
        queries_at = machine.onchip_bytes_per_s if onchip else machine.bytes_per_s
        scores_at = machine.onchip_bytes_per_s if scores_onchip else machine.bytes_per_s
        return (
            operator.window,
            operator.square,
            count * operator.pair_flops / rate,
            count * operator.context_flops / rate,
            count * operator.pair_bytes / scores_at,
            count * operator.context_bytes / machine.bytes_per_s,
            count * operator.token_bytes / queries_at,
            count * operator.pair_flops,
            count * operator.context_flops,
            0.0 if scores_onchip else count * operator.pair_bytes,
            count * operator.context_bytes,
            0.0 if onchip else count * operator.token_bytes,
        )

    def _priced(self, tokens: float, decode: bool) -> _Part:
        each = tokens / self._split
        part = _sum((op.count, op.demand(each, self._machine, decode)) for op in self._tokens)
        network_s = network_bytes = 0.0
        for count, transfer, token_bytes in self._network:
            network_s += count * transfer.seconds(token_bytes * each)
            network_bytes += count * transfer.moved * token_bytes * each
        if len(self._remembered) >= MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[tokens, decode] = priced = (*part, network_s, network_bytes)
        return priced

    def _priced_head(self, sampled: int, decode: bool) -> _Part:
        each = sampled / self._split
        demands = ((op.count, op.demand(each, self._machine, decode)) for op in self._sampled if sampled)
        if len(self._heads) >= MOST_REMEMBERED:
            self._heads.clear()
        self._heads[sampled] = priced = (*_sum(demands), 0.0, 0.0)
        return priced

    # --------------------------------------------------------------------------------------------------- reports

    def operators(self, batch: Batch) -> tuple[tuple[str, float, Demand], ...]:
        """(operator, executions a pass, demand of one execution on one device) of a step, for tables and tests."""
        decode = batch.tokens == batch.decodes
        dense = [
            (op.name, op.count, op.demand(rows / self._split, self._machine, decode))
            for ops, rows in ((self._tokens, batch.tokens), (self._sampled, float(batch.sampled)))
            for op in ops
            if rows
        ]
        attention = [
            (op.name, op.count, op.demand(*_spanned(op, batch, self._split), self._machine))
            for op in self._attention
            if (batch.decodes if op.decode else batch.prefill_tokens)
        ]
        return (*dense, *attention)


def _attended(sums: _Part, operators: tuple[_Attention, ...], batch: Batch, split: int, decode: bool) -> _Part:
    """The sums with the attention of one phase added."""
    compute_s, memory_s, busy_s, flops, nbytes, network_s, network_bytes = sums
    share = 1.0 / split
    queries = (batch.decodes if decode else batch.prefill_tokens) * share
    for window, square, ps, cs, pm, cm, qm, pf, cf, pb, cb, qb in operators:
        spans = batch.full if window is None else batch.windowed[window]
        if decode:
            pairs = context = spans.decode_context * share
        else:
            pairs = (batch.prefill_reach if square else spans.pairs) * share
            context = spans.prefill_context * share
        compute, memory = ps * pairs + cs * context, pm * pairs + cm * context + qm * queries
        if compute >= memory:
            compute_s += compute
        else:
            memory_s += memory
        busy_s += compute
        flops += pf * pairs + cf * context
        nbytes += pb * pairs + cb * context + qb * queries
    return compute_s, memory_s, busy_s, flops, nbytes, network_s, network_bytes


def _spanned(op: Attention, batch: Batch, split: int) -> tuple[float, float, float]:
    """(pairs, keys, queries) of one microbatch that an attention operator meets."""
    spans: Spans = batch.full if op.window is None else batch.windowed[op.window]
    if op.decode:
        return spans.decode_context / split, spans.decode_context / split, batch.decodes / split
    pairs = batch.prefill_reach if op.square else spans.pairs
    return pairs / split, spans.prefill_context / split, batch.prefill_tokens / split


def _sum(demands: Iterable[tuple[float, Demand]]) -> tuple[float, float, float, float, float]:
    compute_s = memory_s = busy_s = flops = nbytes = 0.0
    for count, demand in demands:
        if demand.compute_s >= demand.memory_s:
            compute_s += count * demand.compute_s
        else:
            memory_s += count * demand.memory_s
        busy_s += count * demand.compute_s
        flops += count * demand.flops
        nbytes += count * demand.nbytes
    return compute_s, memory_s, busy_s, flops, nbytes


def _network(placement: Placement, convention: Convention) -> tuple[tuple[int, Transfer, float], ...]:
    """(times a pass, transfer, message bytes per token) of every collective.

    After attention, the devices of one copy all-reduce. Around a feed-forward cut over several copies, tokens are
    gathered and their sums scattered; experts that lie whole are reached all-to-all, and beside them nothing else is
    cut over several copies. Between stages, neighbours talk.
    Only what goes to the experts has the width of an operand, everything else that of a sum.
    """
    shape, parallel, topology = placement.shape, placement.parallel, placement.topology
    operand = shape.hidden * placement.formats.activation_bits / 8
    vector = max(operand, shape.hidden * convention.sum_bits / 8)

    def on(group: int, stride: int = 1) -> Link:
        link = topology.link(group, stride)
        return replace(link, bytes_per_s=link.bytes_per_s * convention.network_share)

    def ring(kind: str, group: int) -> Transfer:
        return collective(kind, group, on(group))

    spread = shape.layers - shape.dense_layers if placement.spread else 0
    cut = 0 if spread else shape.layers
    found = [(shape.layers, ring("all_reduce", parallel.attention), vector / parallel.data)]
    if parallel.data == 1:
        found.append((cut, ring("all_reduce", parallel.tensor), vector))
    else:
        found += [(cut, ring(kind, parallel.tensor), vector) for kind in ("all_gather", "reduce_scatter")]
    copies = _copies(parallel.tensor, topology.devices_per_node, shape.experts_per_token) / parallel.tensor
    dispatched = exchange(parallel.tensor, on(parallel.tensor))
    found += [(spread, dispatched, copies * width) for width in (operand, vector)]
    if parallel.pipeline > 1:
        found.append((parallel.pipeline - 1, point_to_point(on(2, parallel.tensor)), vector / parallel.tensor))
    return tuple(entry for entry in found if entry[0] and entry[1].s_per_byte)


def _copies(devices: int, devices_per_node: int, experts: int) -> float:
    """How often a token's vector crosses the slowest link to reach its experts: once for each on another device, or,
    over several nodes, once for every other node that has any of them, which forwards it (DeepEP). Counted before the
    share (n - 1) / n of an all-to-all that leaves a device."""
    nodes = ceil(devices / devices_per_node)
    if nodes <= 1:
        return experts
    others = (nodes - 1) * (1 - (1 - 1 / nodes) ** experts)
    return others * devices / (devices - 1)
