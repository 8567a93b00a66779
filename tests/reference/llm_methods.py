"""Dense definitions of the LLM-side methods, from the papers' equations.

Sources: ``specs/llm.md`` 1 (ACT), 3.1 (head gates), 7.1 (PASTA), 7.2 (SpotLight), 7.5 (ZeroTuning).

Every function takes the full map A [B, H, n, m] of the heads that are to be edited (of
:func:`.dense.dense_map`: zero where a key is invisible) and returns the edited map. Batch, heads and rows are
explicit loops. Arithmetic is fp64 inside; results are fp32, or fp64 when A is fp64. Nothing is edited in
place and nothing here imports the library.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

from .dense import work_dtype

__all__ = [
    "Stats",
    "act",
    "act_decode",
    "act_released",
    "headgate",
    "instaboost",
    "pasta",
    "reweight",
    "spotlight",
    "zerotuning",
]


class Stats(TypedDict):
    """ACT's column statistics over all rows seen so far."""

    sum: Tensor  # [B, H, m]  sum of A_ij over the valid rows at or after position j
    rows: Tensor  # [B, m]  number of those rows (int64)


# --- reweighting ----------------------------------------------------------------------------------


def _sink_share_of(row: Tensor, dtype: torch.dtype) -> float:
    """1 - sum_j A_ij of one row; a difference within the rounding of the map's dtype counts as no sink."""
    share = 1.0 - float(row.sum())
    return share if share > (1e-12 if dtype == torch.float64 else 1e-6) else 0.0


def reweight(A: Tensor, weights: Tensor, p_sink: Tensor | None = None) -> Tensor:
    """A'_ij = w_ij A_ij / (p_sink_i + sum_t w_it A_it): the softmax of z + log w (``specs/llm.md`` 0.3).

    A [B, H, n, m]; weights >= 0, broadcastable to A; p_sink [B, H, n], the share of the learned sink. Without
    p_sink it is taken as 1 - sum_j A_ij, where a difference up to 1e-6 (fp32) is rounding and counts as zero.
    A row without a visible key stays zero. A row whose denominator is zero (all weights of its visible keys
    are zero and there is no learned sink) has nothing to renormalise and is left unchanged.
    """
    dtype = work_dtype(A)
    a, w = A.double(), weights.double().expand(A.shape)
    out = a.clone()
    batch, heads, n, _ = A.shape
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                sink = _sink_share_of(a[b, h, i], dtype) if p_sink is None else float(p_sink[b, h, i])
                weighted = w[b, h, i] * a[b, h, i]
                denominator = sink + float(weighted.sum())
                if denominator > 0:
                    out[b, h, i] = weighted / denominator
    return out.to(dtype)


# --- ACT ------------------------------------------------------------------------------------------


def _validity(A: Tensor, row_valid: Tensor | None, key_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, n, m = A.shape
    rows = torch.ones(batch, n, dtype=torch.bool) if row_valid is None else row_valid.to(torch.bool).cpu()
    keys = torch.ones(batch, m, dtype=torch.bool) if key_valid is None else key_valid.to(torch.bool).cpu()
    if rows.shape != (batch, n) or keys.shape != (batch, m):
        got = f"{tuple(rows.shape)} and {tuple(keys.shape)}"
        raise ValueError(f"row_valid is [B, n] and key_valid [B, m], got {got}")
    return rows, keys


def _first_valid(keys: Tensor, first: Tensor | None) -> list[int]:
    if first is not None:
        return [int(j) for j in first]
    return [int(torch.nonzero(row)[0]) if bool(row.any()) else 0 for row in keys]


def _redistribute(row: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """One row [m] (fp64): sinks keep beta of their weight, the others share what is freed in proportion.

    The non-sink mass is summed directly, not taken as 1 - s: with learned sinks the row sums to T < 1, and
    near saturation the difference would be rounding.
    """
    sink_mass = float(row[sinks].sum())
    other_mass = float(row[~sinks].sum())
    if other_mass == 0.0:
        return row.clone()
    edited = row * (1.0 + (1.0 - beta) * sink_mass / other_mass)
    edited[sinks] = beta * row[sinks]
    return edited


def act(
    A: Tensor,
    beta: float,
    threshold: float | None = None,
    alpha: float | None = None,
    row_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    first: Tensor | None = None,
    q_start: int = 0,
    min_rows: int = 1,
    stats: Stats | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """ACT on a prefill or on one chunk of it.

    Yu et al., ICML 2024, arXiv 2406.15765; ``specs/llm.md`` 1.2 and the right-hand column of 1.6.
    Per sample and head, with row i at position q_start + i and key j at position j (positions are slots, so
    padding slots count as positions but not as rows or keys)::

        c_j   = (sum of A_ij over valid rows with position >= j) / (number of those rows)
        tau   = threshold, or alpha / N with N the number of valid keys
        S     = { j : c_j > tau, j valid, j != first valid key, at least min_rows rows }
        A'_ij = beta A_ij                                  j in S
        A'_ij = A_ij (1 + (1 - beta) s_i / r_i)            else;  s_i, r_i = mass on S, mass on the rest

    so the mass on S becomes exactly ``beta s_i`` and the sum of the row does not change, with learned sinks
    (T_i < 1) as without. Rows with r_i = 0 and invalid (padding) rows are unchanged.
    With ``visible`` [B, n, m] bool those are the rows that see key j (sliding windows, packed rows); without it, by position alone.

    A [B, H, n, m]; row_valid [B, n] bool; key_valid [B, m] bool; first [B] index of the first valid key
    (default: from key_valid). Chunked prefill: pass the ``stats`` that the previous chunk returned, q_start =
    its number of keys. The statistics then cover all rows seen so far, this chunk included, N counts the keys
    seen so far, and only this chunk's rows are edited. The passed ``stats`` is not modified.

    Returns A' [B, H, n, m], S [B, H, m] bool, and the new stats.
    """
    if (threshold is None) == (alpha is None):
        raise ValueError("give either threshold or alpha")
    batch, heads, n, m = A.shape
    if q_start + n > m:
        raise ValueError(f"row {n - 1} at position {q_start + n - 1} has no key slot (m = {m})")
    dtype, a = work_dtype(A), A.double().cpu()
    rows, keys = _validity(A, row_valid, key_valid)
    start = _first_valid(keys, first)

    total = torch.zeros(batch, heads, m, dtype=torch.float64)
    count = torch.zeros(batch, m, dtype=torch.int64)
    if stats is not None:
        total[:, :, : stats["sum"].shape[-1]] = stats["sum"].double().cpu()
        count[:, : stats["rows"].shape[-1]] = stats["rows"].to(torch.int64).cpu()
    for b in range(batch):
        for i in range(n):
            if not rows[b, i]:
                continue
            position = q_start + i
            for j in range(position + 1):
                if visible is None or bool(visible[b, i, j]):
                    total[b, :, j] += a[b, :, i, j]
                    count[b, j] += 1

    sinks = torch.zeros(batch, heads, m, dtype=torch.bool)
    edited = a.clone()
    for b in range(batch):
        tau = threshold if threshold is not None else alpha / max(int(keys[b].sum()), 1)
        for h in range(heads):
            for j in range(m):
                enough = int(count[b, j]) >= max(min_rows, 1)
                if enough and bool(keys[b, j]) and j != start[b]:
                    sinks[b, h, j] = float(total[b, h, j]) / int(count[b, j]) > tau
            for i in range(n):
                if rows[b, i]:
                    edited[b, h, i] = _redistribute(a[b, h, i], sinks[b, h], beta)

    new_stats: Stats = {"sum": total.to(A.device, dtype), "rows": count.to(A.device)}
    return edited.to(A.device, dtype), sinks.to(A.device), new_stats


def act_decode(
    A: Tensor,
    state: Tensor | Stats | None,
    mode: str,
    beta: float,
    threshold: float | None = None,
    alpha: float | None = None,
    row_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    first: Tensor | None = None,
    q_start: int | None = None,
    min_rows: int = 1,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Stats | None]:
    """ACT on decode rows, n >= 1 of them over m slots.

    ``specs/llm.md`` 1.7: our definitions, the paper's own rule for decoding is unverified.

    A [B, H, n, m]; row i is at position q_start + i (default m - n + i).

    ``frozen``        state = S [B, H, m_prev] bool, from the prefill; new keys are never sinks. Rows are
                      edited with it.
    ``running``       state = stats of the prefill (or of the previous decode step). One row after the other
                      is added to the statistics, S is formed anew (for alpha, N is the number of valid keys
                      up to that row), and the row is edited with it; several rows at once equal the same rows
                      one at a time.
    ``prefill_only``  nothing is edited; the state is handed back.

    Returns A' [B, H, n, m], S [B, H, m] (of the last row; None for ``prefill_only`` unless state is S), and
    the stats (None unless ``running``).
    """
    batch, heads, n, m = A.shape
    dtype = work_dtype(A)
    if mode == "prefill_only":
        return A.to(dtype), state if isinstance(state, Tensor) else None, None
    if mode == "frozen":
        if not isinstance(state, Tensor):
            raise TypeError("frozen needs the sink mask S of the prefill")
        rows, _ = _validity(A, row_valid, key_valid)
        sinks = torch.zeros(batch, heads, m, dtype=torch.bool)
        sinks[:, :, : state.shape[-1]] = state.cpu()
        a = A.double().cpu()
        edited = a.clone()
        for b in range(batch):
            for h in range(heads):
                for i in range(n):
                    if rows[b, i]:
                        edited[b, h, i] = _redistribute(a[b, h, i], sinks[b, h], beta)
        return edited.to(A.device, dtype), sinks.to(A.device), None
    if mode == "running":
        if isinstance(state, Tensor) or state is None:
            raise TypeError("running needs the stats of the prefill")
        if (row_valid is not None and row_valid.shape != (batch, n)) or (
            key_valid is not None and key_valid.shape != (batch, m)
        ):
            raise ValueError("row_valid is [B, n] and key_valid [B, m]")
        base = m - n if q_start is None else q_start
        stats = state
        edited = A.to(dtype).clone()
        sinks = torch.zeros(batch, heads, m, dtype=torch.bool, device=A.device)
        for i in range(n):
            seen = base + i + 1  # this row's position, plus one: a chunk of one row over the keys it can see
            row, now, stats = act(
                A[:, :, i : i + 1, :seen],
                beta,
                threshold,
                alpha,
                None if row_valid is None else row_valid[:, i : i + 1],
                None if key_valid is None else key_valid[:, :seen],
                first,
                q_start=seen - 1,
                min_rows=min_rows,
                stats=stats,
                visible=None if visible is None else visible[:, i : i + 1, :seen],
            )
            edited[:, :, i : i + 1, :seen] = row
            sinks[:, :, :] = False
            sinks[:, :, :seen] = now
        return edited, sinks, stats
    raise ValueError(f"mode is 'frozen', 'running' or 'prefill_only', got {mode!r}")


def act_released(A: Tensor, beta: float, tau: float) -> Tensor:
    """What the released ACT code computes for one head of one sample, faults included.

    GATECH-EIC/ACT, models/llama_modelling_aug.py, commit a267af7 (the evaluation and the calibration function
    are alike); ``specs/llm.md`` 1.2, 1.6.

    A [n, n], the prefill map of batch element 0, or [1, m], one decode row. Computed in A's own dtype, as
    there::

        c_j  = (sum over all rows i of A_ij) / (n - j)           (divisor 1 for every column when n = 1)
        F    = { j : c_j > tau } in increasing order;  S = F without its smallest element
        s_i  = sum_{j in S} A_ij
        B_i  = row i with S set to zero, except that row 0 keeps S
        A'_i = (row i with S scaled by beta) + (1 - beta) s_i B_i / sum(B_i)
        then A'_00 := 1   (the element, whatever the rest of row 0 is)

    What differs from :func:`act`:

    - the first *hit* is exempt, not the first token: if token 0 is not over tau, the first real sink is left
      alone;
    - padding rows count as rows, and padding keys can be sinks (the attention mask is not looked at);
    - no care for 0/0: a row with all its mass on S becomes NaN in every entry, as does an all-zero row even
      if S is empty, because every row passes through the division;
    - row 0 is neither protected nor restored as a whole. For an ordinary causal prefill it is (1, 0, ..)
      before and after. If it has mass elsewhere (left padding under a finfo.min mask), it is edited, with the
      sinks getting part of their own freed mass back, and then A'_00 is overwritten, so that its sum is no
      longer 1;
    - the single decode row is a "row 0": each key over tau but the first such is a sink, the sinks take part
      in the redistribution, and the weight of slot 0 becomes 1 whatever it was (row sum 2 - its edited
      value);
    - 1 < n < m raises (there by a shape mismatch, here by a check);
    - c_j is compared with tau in the dtype of the map (fp16 there), not in fp32;
    - batch elements other than 0 are never edited, and the edit is written into the map that is passed in;
      neither is modelled here (one sample, a new tensor).
    """
    n, m = A.shape
    if n not in (1, m):
        raise ValueError(f"the released code fails for 1 < n < m, got n = {n}, m = {m}")
    hits = [j for j in range(m) if bool(A[:, j].sum() / (n - j if n > 1 else 1) > tau)]
    sinks = hits[1:]
    edited = A.clone()
    for i in range(n):
        freed = (1 - beta) * A[i, sinks].sum()
        base = A[i].clone()
        if i > 0:
            base[sinks] = 0
        scaled = A[i].clone()
        scaled[sinks] = beta * A[i, sinks]
        edited[i] = scaled + freed * (base / base.sum())
    edited[0, 0] = 1
    return edited


# --- ZeroTuning, PASTA, SpotLight -----------------------------------------------------------------


def zerotuning(A: Tensor, gamma: float, first: Tensor, p_sink: Tensor | None = None) -> Tensor:
    """ZeroTuning (Han et al., ICLR 2026, arXiv 2505.11739; ``specs/llm.md`` 7.5).

    ``A'_i0 = gamma A_i0 / D_i``, ``A'_ij = A_ij / D_i``, ``D_i = 1 + (gamma - 1) A_i0``, where "0" is the
    first valid key of the sample. A [B, H, n, m]; first [B] int; prefill and decode alike. p_sink as in
    :func:`reweight`.
    """
    weights = torch.ones(A.shape[0], 1, 1, A.shape[3], dtype=torch.float64, device=A.device)
    for b in range(A.shape[0]):
        weights[b, :, :, int(first[b])] = gamma
    return reweight(A, weights, p_sink)


def pasta(
    A: Tensor,
    alpha: float,
    highlighted: Tensor,
    prompt: Tensor,
    scale_position: str = "exclude",
    p_sink: Tensor | None = None,
) -> Tensor:
    """PASTA (Zhang et al., ICLR 2024, arXiv 2311.02262, and its pastalib; ``specs/llm.md`` 7.1).

    A [B, H, n, m]; highlighted [B, m] bool, the union of the spans; prompt [B, m] bool, every key of the
    prompt (the beginning-of-sequence token too). All query rows. p_sink as in :func:`reweight`.

    ``exclude``  keys of the prompt that are not highlighted get the weight alpha >= 0; highlighted and
                 generated keys 1.
    ``include``  as coded: log alpha is added to the scores of the highlighted keys, then subtracted from
                 those of the whole prompt. Net: the other prompt keys get 1 / alpha, so include(alpha) =
                 exclude(1 / alpha).

    pastalib differs for several spans: with ``exclude`` each span penalises the others too, with ``include``
    overlapping spans count twice. A single span agrees.
    """
    batch, m = A.shape[0], A.shape[3]
    weights = torch.ones(batch, 1, 1, m, dtype=torch.float64, device=A.device)
    for b in range(batch):
        for j in range(m):
            marked, in_prompt = bool(highlighted[b, j]), bool(prompt[b, j])
            if scale_position == "exclude":
                weights[b, 0, 0, j] = alpha if in_prompt and not marked else 1.0
            elif scale_position == "include":
                log_weight = 0.0
                if in_prompt and marked:
                    log_weight += math.log(alpha)
                if in_prompt:
                    log_weight -= math.log(alpha)
                weights[b, 0, 0, j] = math.exp(log_weight)
            else:
                raise ValueError(f"scale_position is 'exclude' or 'include', got {scale_position!r}")
    return reweight(A, weights, p_sink)


def instaboost(A: Tensor, factor: float, span: Tensor, p_sink: Tensor | None = None) -> Tensor:
    """InstABoost (Guardieiro et al., arXiv 2506.13734; ``specs/llm.md`` 7.3): log(factor) is added to the scores of the span.

    A [B, H, n, m]; span [B, m] bool; p_sink as in :func:`reweight`.
    """
    weights = torch.ones(A.shape[0], 1, 1, A.shape[3], dtype=torch.float64)
    for b in range(A.shape[0]):
        for j in range(A.shape[3]):
            if span[b, j]:
                weights[b, 0, 0, j] = factor
    return reweight(A, weights, p_sink)


def spotlight(
    A: Tensor,
    target: float,
    span: Tensor,
    pooled: bool = False,
    row_valid: Tensor | None = None,
    p_sink: Tensor | None = None,
) -> Tensor:
    """SpotLight (Venkateswaran & Contractor, EACL 2026, arXiv 2505.12025; ``specs/llm.md`` 7.2).

    psi_i = sum over the span of A_ij, per row and head. If 0 < psi_i < target, the scores of the span get
    + log(target / psi_i) and the softmax is taken again, which gives the span the share target / (1 + target
    - psi_i). Other rows are unchanged (psi_i = 0: the span is in the future or masked).

    pooled=True is the authors' toolkit (AgentToolkit/agent-lifecycle-toolkit): one psi per sample, the mean
    over all heads and query rows of the call, rows that cannot see the span included, and one bias for all of
    them. Rows without any visible key do not count. (The toolkit takes total span mass over total mass, which
    is the same mean when rows sum to one, adds 1e-10 to every weight before the logarithm, future keys
    included, and divides by zero for psi = 0.)

    A [B, H, n, m]; span [B, m] bool; row_valid [B, n] bool: rows that are False (padding) neither count nor
    change. p_sink as in :func:`reweight`.
    """
    a = A.double()
    batch, heads, n, m = A.shape
    valid = torch.ones(batch, n, dtype=torch.bool) if row_valid is None else row_valid.to(torch.bool)
    weights = torch.ones(batch, heads, n, m, dtype=torch.float64, device=A.device)
    touched = torch.zeros(batch, heads, n, dtype=torch.bool, device=A.device)
    for b in range(batch):
        psi = torch.zeros(heads, n, dtype=torch.float64)
        counted = []
        for h in range(heads):
            for i in range(n):
                psi[h, i] = a[b, h, i, span[b]].sum()
                if bool(valid[b, i]) and float(a[b, h, i].sum()) > 0:
                    counted.append(float(psi[h, i]))
        mean = sum(counted) / len(counted) if counted else 0.0
        for h in range(heads):
            for i in range(n):
                share = mean if pooled else float(psi[h, i])
                if bool(valid[b, i]) and 0 < share < target:
                    weights[b, h, i, span[b]] = target / share
                    touched[b, h, i] = True
    return torch.where(touched.unsqueeze(-1), reweight(A, weights, p_sink), A.to(work_dtype(A)))


# --- head gates -----------------------------------------------------------------------------------


def headgate(out: Tensor, gates: Tensor) -> Tensor:
    """Head gates: o'_h = xi_h o_h (Michel et al., NeurIPS 2019, arXiv 1905.10650; ``specs/llm.md`` 3.1, F7).

    out [B, H, n, d], before the output projection; gates [H], one per query head.
    """
    dtype = work_dtype(out)
    edited = torch.zeros_like(out, dtype=dtype)
    for h in range(out.shape[1]):
        edited[:, h] = gates[h].to(dtype) * out[:, h].to(dtype)
    return edited
