"""Rounds the weights of a model so that the outputs of its layer change little on calibration text.

The method is GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights are rounded one input after the other, and the
following weights compensate for the errors of those before. It is implemented in the equivalent form of Babai's nearest
plane algorithm (Chen et al. 2025, arXiv 2507.18553), which needs one Cholesky factor and no inverse. With
H = sum of u u^T over the inputs u, and H = R^T R, the error |R (q - w)|^2 for given q_{j+1}, ... is smallest if q_j is
w_j - sum_{k > j} R_jk (q_k - w_k) / R_jj, rounded. Inputs with large H_jj come first ("act-order"). The scales are
initially those of plain rounding ("static groups"). Then coordinate descent over the codes (as in QuantEase, arXiv
2309.01885) and least squares over the scales, both in the metric of H, improve the result.

All L layer steps share the weights, so H is one sum over the tokens and the layer steps. The geometry of the layer
determines the rest:

- The error of a neuron matters only where it fires. Each neuron therefore has its own H: for E, over the tokens where
  x_i > 0; for Ev, over those where x_i > 0 and y_i > 0, since z_i = x_i y_i is 0 elsewhere. The neuron's H takes its
  first NEURON_SAMPLES * D such tokens and, with a small weight, the H of all tokens. For a neuron that never fires,
  only the latter is left.
- Dec has a row for each input. A group of weights that shares a scale therefore lies within one input, and its scale is
  determined when that input is rounded. H has an entry for each pair of neurons, (H * N)^2 with H heads of N neurons,
  which is too large for memory. Blocks of DECODER_BLOCK neurons are therefore rounded one after the other, each in the
  metric of its own part of H. The effect of earlier blocks on the outputs is known for each token. It is subtracted
  from the targets of a block as far as the block can compensate for it. Tokens are weighted by 1 over the standard
  deviation of Dec's output, by which LN divides it.
- The wide activations are never stored. The inputs of E and Ev have width D, and x, y and z of a block of neurons are
  computed from them.
- Each layer step gets its true input v, that of the model before rounding. The errors of a layer step therefore do not
  add to those of the next, and one forward pass suffices. The inputs of Dec are computed from v and a with the rounded
  E and Ev, and its targets are the outputs without any rounding, as in GPTAQ (Li et al. 2025, arXiv 2504.02692), so
  that it compensates for some of the errors of E and Ev.

The free scalings of the layer are not used. Multiplying row i of Ev by c > 0 and row i of Dec by 1/c changes nothing,
but in both formats a scale belongs to one row or a part of it, and changes along with c. A rotation common to all D,
which evens out the weights of other models, would not commute with LN, which subtracts the mean and lies between any
two products.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from bdh.model.network import exact_dtype
from bdh.ops import QuantizedFormat, eager
from bdh.ops.attention import DecayMask, rotation_table
from bdh.ops.formats import CODE_RANGES, GROUP, Codes, check_finite, rounded, scales_of
from bdh.quantize.progress import Progress, Stages
from bdh.words import counted

MAX_SAMPLES = 2**16
"""The maximum number of inputs of layer steps to keep, over all tokens and layer steps."""
SAMPLE_BYTES = 2**30
"""The maximum memory for these inputs."""
NEURON_SAMPLES = 4
"""The maximum number of inputs in a neuron's own H, in multiples of D."""
_SHARED = 0.3
"""The weight of the H of all inputs in that of a neuron, relative to NEURON_SAMPLES * D inputs of weight 1."""
_DAMPING = 0.03
"""The fraction of its mean that is added to the diagonal of H."""
DECODER_BLOCK = 2048
"""The number of neurons that compensate for each other's errors in Dec."""
_DECODER_DAMPING = 0.1
_REFINEMENTS = 2
_WIDE = 2**24
"""The maximum number of values in a wide tensor: 64 MiB."""
_HESSIANS = 2**25
"""The maximum number of values in the matrices H of neurons that are rounded together: 128 MiB."""
_ROWS_AT_ONCE = 256
"""The maximum number of neurons of E or Ev that are rounded together."""
_INPUTS_AT_ONCE = 2048
"""The number of inputs that are searched at a time for those that count for some neurons."""

Counts = Callable[[slice, torch.Tensor], torch.Tensor]
"""A function of some inputs and some rows that returns bool (inputs, rows): whether an input counts for a row."""


class _Layer(NamedTuple):
    """The weights of the layer in float32, with a row for each neuron."""

    encoder: torch.Tensor  # (H*N, D)
    encoder_v: list[torch.Tensor]  # H of (N, D)
    decoder: torch.Tensor  # (H*N, D)


class _Samples(NamedTuple):
    """The inputs of the matrix products, for some tokens and layer steps, in random order."""

    v: torch.Tensor
    """(S, D), the inputs of E."""
    a: torch.Tensor
    """(H, S, D), the inputs of each head of Ev."""
    importance: torch.Tensor
    """(S,): 1 over the standard deviation of Dec's output; 0 where that is 0, as for the first token of a text."""


def gptq_codes(
    model: Any,
    sequences: Iterable[torch.Tensor],
    formats: Mapping[str, QuantizedFormat],
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Codes]:
    """Returns the rounded weights of the layer's modules. The same text gives the same codes. The model is not changed.

    Args:
        model: a model with plain modules, such as :class:`bdh.model.network.ModelParts`.
        sequences: calibration text, int64 (B, T). Each sequence is read with an empty state.
        formats: formats by the names of modules: "encoder", "encoder_v.0" and so on, "decoder". Modules without a
            format are not rounded.
        progress: called with the stage, the work done and the total work.

    Raises:
        ValueError: the text is too short, or a weight or an activation is infinite or NaN.
    """
    layer, D = _layer_of(model), model.config.n_embd
    names = ["encoder", *(f"encoder_v.{head}" for head in range(len(layer.encoder_v))), "decoder"]
    for name, weight in zip(names, [layer.encoder, *layer.encoder_v, layer.decoder], strict=True):
        check_finite(weight, name)
    batches = list(sequences)
    num_tokens = sum(batch.numel() for batch in batches)
    if num_tokens < D:
        raise ValueError(
            f"the calibration text has {counted(num_tokens, 'token')}: at least {D} are needed, the model's width"
        )
    number = _num_samples(num_tokens * model.config.n_layer, D, len(layer.encoder_v))
    seconds = _seconds(layer, num_tokens * model.config.n_layer, number)
    stages = Stages(
        progress, "gptq", {name: each for name, each in seconds.items() if name in ("calibration", *formats)}
    )
    with torch.no_grad():
        samples = _gather(model, batches, layer, number, stages.of("calibration"))
        codes: dict[str, Codes] = {}
        if "encoder" in formats:
            codes["encoder"] = _round_encoder(layer, samples, formats["encoder"], stages.of("encoder"))
        for head, name in enumerate(names[1:-1]):
            if name in formats:
                codes[name] = _round_encoder_v(layer, samples, head, formats[name], stages.of(name))
        if "decoder" in formats:
            after = _with(layer, codes)
            codes["decoder"] = _round_decoder(layer, after, samples, formats["decoder"], stages.of("decoder"))
    stages.end()
    return codes


def _seconds(layer: _Layer, num_inputs: int, number: int) -> dict[str, float]:
    """Returns the expected time of each stage on a core of 2024. Only the ratios matter.

    Args:
        num_inputs: the number of tokens, times layer steps.
        number: the number of these inputs that are kept.
    """
    (num_neurons, D), H = layer.encoder.shape, len(layer.encoder_v)
    seconds = {"calibration": 2.0e-10 * num_inputs * num_neurons * D, "encoder": 7.3e-8 * num_neurons * D**2}
    seconds |= {f"encoder_v.{head}": 9.0e-8 * num_neurons / H * D**2 for head in range(H)}
    of_input = 1.4e-11 * min(DECODER_BLOCK, num_neurons) + 1.4e-10 * D + 2.9e-8
    return seconds | {"decoder": number * num_neurons * of_input}


def _layer_of(model: Any) -> _Layer:
    encoder, *encoder_v, decoder = (
        module.weight.detach().float() for module in (model.encoder, *model.encoder_v, model.decoder)
    )
    return _Layer(encoder, encoder_v, decoder.t().contiguous())


def _with(layer: _Layer, codes: Mapping[str, Codes]) -> _Layer:
    """Returns the layer with those weights replaced that have been rounded."""
    new = {name: each.dequantized() for name, each in codes.items()}
    heads = [new.get(f"encoder_v.{head}", weight) for head, weight in enumerate(layer.encoder_v)]
    return _Layer(new.get("encoder", layer.encoder), heads, layer.decoder)


# Calibration text.


def _num_samples(num_inputs: int, D: int, H: int) -> int:
    """Returns the number of inputs to keep."""
    return min(num_inputs, MAX_SAMPLES, max(D, SAMPLE_BYTES // (4 * D * (1 + H))))


def _gather(
    model: Any, batches: Sequence[torch.Tensor], layer: _Layer, number: int, progress: Callable[[int, int], None]
) -> _Samples:
    """Returns the inputs of randomly drawn tokens and layer steps."""
    D, H, L, device = model.config.n_embd, len(layer.encoder_v), model.config.n_layer, layer.encoder.device
    num_tokens = sum(batch.numel() for batch in batches)
    chosen = torch.randperm(num_tokens * L, generator=torch.Generator().manual_seed(0))[:number]
    order = torch.full((num_tokens * L,), -1).index_copy_(0, chosen, torch.arange(number)).to(device)
    v_samples = torch.empty(number, D, device=device)
    a_samples = torch.empty(H, number, D, device=device)
    importance = torch.empty(number, device=device)
    done = 0
    for inputs in _layer_steps(model, batches, layer):
        count = inputs.v.shape[0]
        slots = order[done : done + count]
        kept = slots >= 0
        v_samples[slots[kept]] = inputs.v[kept]
        a_samples[:, slots[kept]] = inputs.a[:, kept]
        importance[slots[kept]] = inputs.importance[kept]
        done += count
        progress(done, num_tokens * L)
    if not (v_samples.isfinite().all() and a_samples.isfinite().all()):
        raise ValueError("the model's activations on the calibration text are infinite or not a number")
    return _Samples(v_samples, a_samples, importance)


def _layer_steps(model: Any, batches: Sequence[torch.Tensor], layer: _Layer) -> Iterator[_Samples]:
    """Yields the inputs of all tokens and each layer step, in pieces whose wide activations are small."""
    config, num_neurons, device = model.config, len(layer.encoder), layer.encoder.device
    most = max(1, _WIDE // num_neurons)  # tokens at once
    for batch in batches:
        T = batch.shape[1]
        for tokens in batch.to(device).split(max(1, most // T)):
            states: list[torch.Tensor | None] = [None] * config.n_layer
            for start in range(0, T, most):
                v = eager.layer_norm(model.embed(tokens[:, start : start + most]).float(), config.layer_norm_eps)
                spec = _spec(config, start, v.shape[1], device, keep_state=start + most < T)
                for index in range(config.n_layer):
                    kept: list[torch.Tensor] = []
                    following, states[index] = eager.train(v, _listening(layer, kept), spec, states[index])
                    *a, output = kept  # the output of Dec
                    deviation = output.flatten(0, -2).std(-1)
                    importance = torch.where(deviation > 0, 1 / (deviation**2 + config.layer_norm_eps).sqrt(), 0)
                    yield _Samples(v.flatten(0, -2), torch.stack([each.flatten(0, -2) for each in a]), importance)
                    v = following


def _spec(config: Any, start: int, T: int, device: torch.device, keep_state: bool) -> eager.EagerSpec:
    positions = torch.arange(start, start + T, device=device)[None]
    half_lives = config.half_lives
    return eager.EagerSpec(
        table=rotation_table(positions, config.neurons_per_head, config.rope_theta, torch.float32)[:, None],
        eps=config.layer_norm_eps,
        dtype=torch.float32,
        chunk_size=config.chunk_size,
        decay_mask=None if half_lives is None else DecayMask(half_lives=torch.tensor(half_lives, device=device)),
        keep_state=keep_state,
    )


def _listening(layer: _Layer, kept: list[torch.Tensor]) -> eager.Layer:
    """Returns the layer's functions, which append the inputs of each head of Ev and the output of Dec to ``kept``."""

    def encoder_v(weight: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        kept.append(a)
        return linear(a, weight)

    def decoder(z: torch.Tensor) -> torch.Tensor:
        kept.append(z @ layer.decoder)
        return kept[-1]

    heads = [partial(encoder_v, weight) for weight in layer.encoder_v]
    return eager.Layer(partial(linear, weight=layer.encoder), heads, decoder)


# E and Ev: the sum is over D inputs, and each row is rounded independently.


def _round_encoder(
    layer: _Layer, samples: _Samples, format: QuantizedFormat, progress: Callable[[int, int], None]
) -> Codes:
    def counts(part: slice, rows: torch.Tensor) -> torch.Tensor:
        return linear(samples.v[part], layer.encoder[rows]) > 0

    return _round_rows(layer.encoder, samples.v, counts, format, progress)


def _round_encoder_v(
    layer: _Layer, samples: _Samples, head: int, format: QuantizedFormat, progress: Callable[[int, int], None]
) -> Codes:
    weight, a = layer.encoder_v[head], samples.a[head]
    encoder = layer.encoder[head * len(weight) : (head + 1) * len(weight)]

    def counts(part: slice, rows: torch.Tensor) -> torch.Tensor:
        return (linear(samples.v[part], encoder[rows]) > 0) & (linear(a[part], weight[rows]) > 0)

    return _round_rows(weight, a, counts, format, progress)


def _round_rows(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    counts: Counts,
    format: QuantizedFormat,
    progress: Callable[[int, int], None],
) -> Codes:
    """Rounds rows (rows, D), each in the metric of its own H.

    Args:
        inputs: (S, D).
        counts: for which inputs the error of a row counts.
    """
    num_rows, D = weight.shape
    shared = inputs.t() @ inputs / len(inputs)
    found, done = [], 0
    at_once = max(1, min(_HESSIANS // D**2, _ROWS_AT_ONCE))
    for rows in torch.arange(num_rows, device=weight.device).split(at_once):
        taken = _first_inputs(len(inputs), rows, counts, NEURON_SAMPLES * D)
        found.append(round_in_metric(weight[rows], neuron_hessians(inputs, taken, shared), format))
        done += len(rows)
        progress(done, num_rows)
    return Codes(torch.cat([each.codes for each in found]), torch.cat([each.scales for each in found]))


def _first_inputs(S: int, rows: torch.Tensor, counts: Counts, most: int) -> torch.Tensor:
    """Returns the first ``most`` of S inputs that count for each row, int64 (rows, most), padded with S."""
    taken = torch.full((len(rows), most), S, device=rows.device)
    found = torch.zeros_like(rows)  # for each row, until now
    for start in range(0, S, _INPUTS_AT_ONCE):
        open_rows = (found < most).nonzero()[:, 0]
        if not len(open_rows):
            break
        hits = counts(slice(start, start + _INPUTS_AT_ONCE), rows[open_rows]).t().contiguous()  # (open rows, inputs)
        of_row, of_input = hits.nonzero(as_tuple=True)
        number = hits.sum(1)
        place = torch.arange(len(of_row), device=rows.device) - (number.cumsum(0) - number)[of_row]  # in this piece
        place += found[open_rows][of_row]
        fits = place < most
        taken[open_rows[of_row[fits]], place[fits]] = of_input[fits] + start
        found[open_rows] += number
    return taken


def neuron_hessians(inputs: torch.Tensor, taken: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Returns the H of each neuron, (rows, D, D).

    Args:
        inputs: (S, D).
        taken: int64 (rows, NEURON_SAMPLES * D), the inputs that form the H of each neuron; S for none.
        shared: (D, D), the mean over all inputs.
    """
    (num_rows, most), D = taken.shape, inputs.shape[1]
    with_zero = torch.cat([inputs, inputs.new_zeros(1, D)])  # the last row means no input
    hessians = inputs.new_empty(num_rows, D, D)
    at_once = max(1, _WIDE // (most * D))
    for start in range(0, num_rows, at_once):
        some = with_zero[taken[start : start + at_once]]  # (rows, most, D)
        torch.bmm(some.transpose(1, 2), some, out=hessians[start : start + at_once])
    return hessians.add_(shared, alpha=_SHARED * most)


def round_in_metric(weight: torch.Tensor, hessians: torch.Tensor, format: QuantizedFormat) -> Codes:
    """Rounds rows w (rows, D) to codes q such that (q - w)^T H (q - w) is small.

    H is (rows, D, D) with one for each row, or (1, D, D) for all rows.
    """
    D, diagonal = weight.shape[1], hessians.diagonal(dim1=1, dim2=2)
    damping = _DAMPING * diagonal.mean(1, keepdim=True)
    damping = torch.where(damping > 0, damping, 1.0)  # without any inputs, the result is plain rounding
    hessians = hessians + damping[:, :, None] * torch.eye(D, device=weight.device)
    found = nearest_plane(weight, hessians, scales_of(weight, format), format)
    for _ in range(_REFINEMENTS):
        found = _descend(weight, hessians, _fit_scales(weight, hessians, found), format)
    return found


def nearest_plane(weight: torch.Tensor, hessians: torch.Tensor, scales: torch.Tensor, format: QuantizedFormat) -> Codes:
    """Returns the codes of rows for given scales, by Babai's algorithm. H must be positive definite."""
    order = hessians.diagonal(dim1=1, dim2=2).mean(0).argsort(stable=True)  # from the last to the first
    factor = torch.linalg.cholesky(hessians[:, order][:, :, order], upper=True)
    wide = _per_weight(scales, weight.shape[1])[:, order]
    w, errors, codes = weight[:, order], torch.zeros_like(weight), torch.zeros_like(weight)
    for j in reversed(range(weight.shape[1])):
        shift = (factor[:, j, j + 1 :] * errors[:, j + 1 :]).sum(1) / factor[:, j, j]
        codes[:, j] = _rounded(w[:, j] - shift, wide[:, j], format)
        errors[:, j] = codes[:, j] * wide[:, j] - w[:, j]
    return Codes(torch.empty_like(codes).index_copy_(1, order, codes).to(torch.int8), scales)


def _descend(weight: torch.Tensor, hessians: torch.Tensor, start: Codes, format: QuantizedFormat) -> Codes:
    """Sets each code in turn to the best one, given the others."""
    wide, codes = _per_weight(start.scales, weight.shape[1]), start.codes.float()
    errors = codes * wide - weight
    for j in range(weight.shape[1]):
        shift = (hessians[:, j] * errors).sum(1) / hessians[:, j, j]
        new = _rounded(codes[:, j] * wide[:, j] - shift, wide[:, j], format)
        errors[:, j] += (new - codes[:, j]) * wide[:, j]
        codes[:, j] = new
    return Codes(codes.to(torch.int8), start.scales)


def _fit_scales(weight: torch.Tensor, hessians: torch.Tensor, start: Codes) -> Codes:
    """Sets each scale in turn to the best one, given the codes and the other scales."""
    D, scales, codes = weight.shape[1], start.scales.float(), start.codes.float()
    errors = start.dequantized() - weight
    length = D if scales.shape[1] == 1 else GROUP
    for index, first in enumerate(range(0, D, length)):
        of_group = slice(first, first + length)
        group = codes[:, of_group]
        slope = ((hessians[:, of_group] @ errors[:, :, None])[..., 0] * group).sum(1)
        curvature = ((hessians[:, of_group, of_group] @ group[:, :, None])[..., 0] * group).sum(1)
        step = torch.where(curvature > 0, slope / torch.where(curvature > 0, curvature, 1.0), 0.0)
        new = (scales[:, index] - step).to(torch.bfloat16).float()
        errors[:, of_group] += (new - scales[:, index])[:, None] * group
        scales[:, index] = new
    return Codes(start.codes, scales.to(torch.bfloat16))


def _per_weight(scales: torch.Tensor, D: int) -> torch.Tensor:
    """Returns the scale of each weight, float32 (rows, D), from bfloat16 (rows, groups)."""
    return Codes(torch.ones(len(scales), D, dtype=torch.int8, device=scales.device), scales).dequantized()


def _rounded(values: torch.Tensor, scales: torch.Tensor, format: QuantizedFormat) -> torch.Tensor:
    """Returns the codes of one weight of each row, as float32."""
    return (values / torch.where(scales == 0, 1.0, scales)).round().clamp(*CODE_RANGES[format])


# Dec: the sum is over the neurons, and rows compensate for each other's errors.


def _outputs(layer: _Layer, samples: _Samples, neurons: torch.Tensor, part: slice) -> torch.Tensor:
    """Returns z (samples, neurons), as Dec gets it, times the samples' importance; ``neurons`` must be in order."""
    N = len(layer.encoder_v[0])
    z = linear(samples.v[part], layer.encoder[neurons]).relu_()
    start = 0
    for head, number in enumerate((neurons // N).bincount().tolist()):
        of_head = slice(start, start + number)
        y = linear(samples.a[head, part], layer.encoder_v[head][neurons[of_head] - head * N])
        z[:, of_head] *= y.relu_()
        start += number
    return z.mul_(samples.importance[part, None])


def _round_decoder(
    before: _Layer,
    layer: _Layer,
    samples: _Samples,
    format: QuantizedFormat,
    progress: Callable[[int, int], None],
) -> Codes:
    """Rounds Dec. Its inputs are those of ``layer``, with E and Ev rounded; its targets are outputs of ``before``."""
    decoder, S, device = layer.decoder, len(samples.v), layer.decoder.device
    num_neurons, D = decoder.shape
    parts = [slice(start, min(start + 4096, S)) for start in range(0, S, 4096)]
    blocks = torch.arange(num_neurons, device=device).split(DECODER_BLOCK)
    work = len(parts) * len(blocks)
    residual = torch.zeros(S, D, device=device)  # the error of the output
    energy = torch.zeros(num_neurons, device=device)
    for number, part in enumerate(parts):
        progress(2 * number * len(blocks), 5 * work)
        for block in blocks:
            z = _outputs(layer, samples, block, part)
            energy[block] += z.square().sum(0)
            if layer is not before:
                z -= _outputs(before, samples, block, part)
                residual[part] += z @ decoder[block]
    found = rounded(decoder, format)
    if not (mean := energy.mean()) > 0:
        return found
    blocks = energy.argsort(descending=True, stable=True).split(DECODER_BLOCK)
    for done, block in enumerate(blocks):
        neurons, place = block.sort()  # neurons == block[place]
        order = place.argsort()
        hessian = torch.zeros(len(block), len(block), device=device)
        slope = torch.zeros(len(block), D, device=device)
        for number, part in enumerate(parts):
            progress(2 * work + 3 * (done * len(parts) + number), 5 * work)
            z = _outputs(layer, samples, neurons, part)
            hessian.addmm_(z.t(), z)
            slope.addmm_(z.t(), residual[part])
        hessian, slope = hessian[order][:, order], slope[order]
        codes = _round_block(decoder[block], hessian, slope, _DECODER_DAMPING * mean, format)
        found.codes[block], found.scales[block] = codes
        change = (codes.dequantized() - decoder[block])[place]
        for part in parts if done + 1 < len(blocks) else ():
            residual[part] += _outputs(layer, samples, neurons, part) @ change
    return found


def _round_block(
    weight: torch.Tensor, hessian: torch.Tensor, slope: torch.Tensor, damping: torch.Tensor, format: QuantizedFormat
) -> Codes:
    """Rounds rows of Dec, (n, D), by Babai's algorithm. Each row is rounded as a whole, with new scales.

    Args:
        hessian: (n, n), the sum of z z^T.
        slope: (n, D), the sum of z times the error that the output already has.
    """
    # Flipped, since the last row is rounded first: it should be that of the neuron with the largest z, which is first.
    exact = hessian.flip(0, 1).to(exact_dtype(weight.device))
    exact.diagonal().add_(damping)
    factor = torch.linalg.cholesky(exact, upper=True)
    target = weight.flip(0) - torch.cholesky_solve(slope.flip(0).to(exact.dtype), factor, upper=True).to(weight.dtype)
    factor = factor.to(weight.dtype)
    errors, found = torch.zeros_like(target), []
    for stop in range(len(weight), 0, -_DECODER_ROWS_AT_ONCE):
        start = max(0, stop - _DECODER_ROWS_AT_ONCE)
        shifts = factor[start:stop, stop:] @ errors[stop:]
        for j in reversed(range(start, stop)):
            shift = (shifts[j - start] + factor[j, j + 1 : stop] @ errors[j + 1 : stop]) / factor[j, j]
            found.append(rounded((target[j] - shift)[None], format))
            errors[j] = found[-1].dequantized()[0] - target[j]
    return Codes(torch.cat([each.codes for each in found]), torch.cat([each.scales for each in found]))


_DECODER_ROWS_AT_ONCE = 128
"""The number of rows of Dec whose errors are propagated to the others in one matrix product."""
