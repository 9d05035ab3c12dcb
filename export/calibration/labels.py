"""What each cached pair was worth to later queries, taken while a window is read: the labels of retention heads.

KVzap's (arXiv 2601.07891): a pair adds a . W_o v to the residual stream of a query that gives it the weight a; relative
to what that stream's attention reads, h, that is a ||W_o v|| / ||h||. The label of a token and KV head is the logarithm
of the largest such share over later queries and the heads that read the KV head. Locret's (arXiv 2410.01805) are the
logarithm of the largest a.

Which queries: those that read the same text once more, after a request to repeat it (``repeat``, as KVzap and KVzip
do; the answer's part in Locret's questions and answers); or those of the text itself that come after the token
(``later``), which takes half of the time, and is what layers with a sliding window always use, as they see nothing of a
text that is a window ago.
"""

from __future__ import annotations

from collections.abc import Callable

from .decoder import LayerActivations, Observer, Tensor, require_torch
from .text import Window

LEAST_SHARE = 1e-12  # smaller ones are all the same to us, and 0 has no logarithm


class Labels(Observer):
    """KVzap's. Calls ``take(layer, inputs, labels)`` at the end of each layer: float32 [C, hidden] and [C, K] of the
    labelled tokens. After the run, `finish` does so for the last layer.
    """

    def __init__(
        self, window: Window, windows: tuple[int, ...], take: Callable[[int, Tensor, Tensor], object]
    ) -> None:
        self._torch = require_torch()
        self._window = window
        self._windows = windows
        self._take = take
        self._seen: LayerActivations | None = None
        self._best: Tensor = None
        self._share: Tensor = None

    def enter(self, activations: LayerActivations, /) -> None:
        self.finish()
        torch, span = self._torch, self._window
        heads = activations.queries.shape[1]
        self._seen = activations
        self._best = torch.zeros(heads, span.end - span.first)
        self._share = 1 / activations.inputs.norm(dim=-1).clamp_min(LEAST_SHARE)

    def attended(self, head: int, first: int, weights: Tensor, /) -> None:
        assert self._seen is not None
        span, end = self._window, first + len(weights)
        repeated = None if self._windows[self._seen.layer] else span.repeated
        start = max(first, span.first if repeated is None else repeated)
        seen = weights[start - first :, span.first : span.end]
        if start >= end or not seen.shape[1]:
            return
        if repeated is None:  # not the token itself, nor what it cannot know
            seen = seen.tril(start - span.first - 1)
        shares = (seen * self._share[start:end, None]).amax(dim=0)
        best = self._best[head, : len(shares)]
        self._torch.maximum(best, shares, out=best)

    def finish(self) -> None:
        """Hands over the layer that was entered last."""
        if self._seen is not None:
            with self._torch.inference_mode():
                self._hand_over(self._seen)
        self._seen = None

    def _hand_over(self, found: LayerActivations) -> None:
        self._weigh(found)
        best = self._best.view(found.values.shape[1], -1, self._best.shape[1]).amax(dim=1)
        features = self._features(found, slice(self._window.first, self._window.end))
        self._take(found.layer, features, best.clamp_min(LEAST_SHARE).log().T)

    def _weigh(self, found: LayerActivations) -> None:
        """The largest shares of each head, `_best` [H, C], times what the value adds."""
        heads, size = found.queries.shape[1:]
        group = heads // found.values.shape[1]
        for head in range(heads):
            output = found.output_weight[:, head * size : (head + 1) * size]
            values = found.values[self._window.first : self._window.end, head // group]
            squares = (values @ (output.T @ output) * values).sum(dim=-1)  # of W_o v, without making it
            self._best[head] *= squares.clamp_min(0).sqrt()

    def _features(self, found: LayerActivations, rows: slice) -> Tensor:
        return found.inputs[rows]


class WorthOfPairs(Labels):
    """KVzap's labels for heads that look at the pair. Calls ``take(layer, features, labels)``: features float32
    [C, (H + 2K) x D] are what the attention takes as queries, keys and values, before RoPE, side by side.
    """

    def _features(self, found: LayerActivations, rows: slice) -> Tensor:
        return self._torch.cat([part[rows].flatten(1) for part in (found.queries, found.keys, found.values)], dim=1)


class AnswerAttention(WorthOfPairs):
    """Locret's labels, with the same features.

    Departure: the paper has the largest q . k / sqrt(d), before the softmax. What all keys get from a query alike says
    nothing of a key, and keys with biases make much of it: in Qwen's first layers single heads have logits of 500 that
    differ by ten, and the largest is that of the query with the largest such part. The logarithm of the attention is
    the same logit less what the query gives to all.
    """

    def enter(self, activations: LayerActivations, /) -> None:
        super().enter(activations)
        self._share = self._torch.ones_like(self._share)

    def _weigh(self, found: LayerActivations) -> None:
        """Not at all."""
