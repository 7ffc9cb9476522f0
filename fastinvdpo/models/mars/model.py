"""The model: a frozen decoder with visual experts, image tokens in its vocabulary, log-probabilities of both."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastinvdpo.errors import invalid
from fastinvdpo.models.mars.experts import Routing, add_experts
from fastinvdpo.ops.token_log_probs import token_log_probs

Reduction = Literal["none", "sum", "mean"]


@dataclass(frozen=True)
class MarsConfig:
    """What a MARS model adds to its decoder.

    Attributes:
        codes: size of the image vocabulary; 8192 in the paper.
        shared_output: one output projection of the attention for both modalities; by default one each, as in CogVLM.
        visual_norms: norms of their own for image tokens; by default shared and frozen, as in the paper's figure.

    Raises:
        InvalidInput: ``codes`` is not a positive integer.
    """

    codes: int = 8192
    shared_output: bool = False
    visual_norms: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.codes, int) or self.codes < 1:
            raise invalid("codes", self.codes, "is no positive integer", "pass the size of the tokenizer's codebook")


class MarsModel(nn.Module):
    """A Llama- or Qwen-shaped decoder of transformers with a visual expert in every layer.

    Token ids: those of the text, then one for each image code, then begin and end of an image. Ids of the text take
    the frozen text expert, all others the visual one. Visual embeddings start at the mean of those of the text, and the
    rows of the visual head at the mean row of the text head: an untrained model finds all codes equally likely.

    Attributes:
        decoder: the language model, frozen but for the visual experts.
        visual_embedding: ``(codes + 2, D)``; visual_head: ``(codes, D)``.
        tokenizer: that of the decoder, or None where texts are given as ids.
        origin: what :func:`load_mars` loads the decoder from; None for one at hand.

    Args:
        decoder: a causal language model of transformers, of any dtype; it is changed in place.

    Raises:
        InvalidInput: the decoder has another shape.
    """

    def __init__(self, decoder: Any, config: MarsConfig, tokenizer: Any = None, origin: dict[str, Any] | None = None):
        super().__init__()
        self.config, self.tokenizer, self.origin = config, tokenizer, origin
        inner, head = getattr(decoder, "model", None), getattr(decoder, "lm_head", None)
        if inner is None or head is None or not hasattr(inner, "layers") or getattr(head, "bias", None) is not None:
            remedy = "pass a Llama, Qwen2 or Qwen3 model for causal language modeling"
            raise invalid("decoder", type(decoder).__name__, "is not of the Llama/Qwen shape", remedy)
        self.decoder = decoder.requires_grad_(False)
        add_experts(inner.layers, config.shared_output, config.visual_norms)
        mean = inner.embed_tokens.weight.detach().float().mean(0).to(inner.embed_tokens.weight.dtype)
        self.visual_embedding = nn.Parameter(mean.repeat(config.codes + 2, 1))
        row = head.weight.detach().float().mean(0).to(head.weight.dtype)
        self.visual_head = nn.Parameter(row.repeat(config.codes, 1))
        accepted = inspect.signature(type(inner).forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"

    @property
    def text_size(self) -> int:
        """Number of text ids, and so the id of image code 0."""
        return int(self.decoder.model.embed_tokens.weight.shape[0])

    @property
    def begin(self) -> int:
        """Id of the token before an image's codes; the one after them is the next."""
        return self.text_size + self.config.codes

    @property
    def text_head(self) -> Tensor:
        """``(text_size, D)``, frozen."""
        weight: Tensor = self.decoder.lm_head.weight
        return weight

    def visual_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes and a checkpoint holds, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name in ("visual_embedding", "visual_head") or ".visual." in name
        }

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """Hidden states ``(B, L, D)`` after the last norm.

        Args:
            ids: int64 ``(B, L)``.
            attention_mask: ``(B, past + L)``, 0 for padding, which may stand on the left; None: there is none.
            cache: a cache of transformers, extended in place; the tokens in it come before ``ids``.
        """
        visual = ids >= self.text_size
        text = self.decoder.model.embed_tokens(ids.masked_fill(visual, 0))
        codes = nn.functional.embedding((ids - self.text_size).clamp_min(0), self.visual_embedding)
        options: dict[str, Any] = {self._cache_name: cache, "use_cache": cache is not None}
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            options |= {"attention_mask": attention_mask, "position_ids": positions}
        embedded = torch.where(visual.unsqueeze(-1), codes, text)
        output = self.decoder.model(inputs_embeds=embedded, routing=Routing.of(visual), **options)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def text_ids(self, texts: Sequence[str | Sequence[int]], end: bool = False) -> list[list[int]]:
        """Token ids of texts, or ids as they are given; ``end``: followed by the tokenizer's end of text.

        Raises:
            InvalidInput: a text without a tokenizer, or an id that is none of the text's.
        """
        if isinstance(texts, str):
            raise invalid("texts", texts, "is one string", "pass a list of strings or of token ids")
        found = []
        for i, text in enumerate(texts):
            if isinstance(text, str):
                if self.tokenizer is None:
                    raise invalid(f"texts[{i}]", text, "cannot be split: the model has no tokenizer", "pass token ids")
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                text = [*ids, *([self.tokenizer.eos_token_id] if end else [])]
            ids = [int(token) for token in text]
            if any(not 0 <= token < self.text_size for token in ids):
                raise invalid(
                    f"texts[{i}]", ids, f"are not all ids of 0 … {self.text_size - 1}", "pass ids of the text"
                )
            found.append(ids)
        return found

    def check_codes(self, codes: Tensor) -> None:
        """Raise ``InvalidInput`` unless these are codes of images, int64 ``(B, N)`` of at least one token each.

        On a GPU, where it would wait for the device, values are not looked at.
        """
        if codes.ndim != 2 or codes.dtype != torch.int64 or codes.numel() == 0:
            raise invalid("codes", (tuple(codes.shape), codes.dtype), "are not int64 (B, N)", "pass one row an image")
        least, largest = map(int, codes.aminmax()) if codes.is_cpu else (0, 0)
        if least < 0 or largest >= self.config.codes:
            remedy = "encode with the tokenizer that the model was made for"
            raise invalid("codes", (least, largest), f"are not all in 0 … {self.config.codes - 1}", remedy)

    def image_log_probs(
        self, prompts: Sequence[str | Sequence[int]], codes: Tensor, reduction: Reduction = "none"
    ) -> Tensor:
        """``log π`` of each image's tokens given its prompt, among the image codes: ``(B, N)``, or ``(B,)`` reduced.

        Args:
            prompts: texts or token ids, one an image; an empty one is the unconditional prompt.
            codes: int64 ``(B, N)`` in raster order.
            reduction: ``sum`` over an image's tokens, or their ``mean``, which is normalized by length.
        """
        self.check_codes(codes)
        ids, mask = self.prompt(prompts, codes.device)
        if len(ids) != len(codes):
            raise invalid("prompts", len(ids), f"are not one for each of {len(codes)} images", "pass as many")
        given = codes[:, :-1]
        ids, mask = torch.cat([ids, given + self.text_size], 1), torch.cat([mask, torch.ones_like(given)], 1)
        hidden = self(ids, mask)[:, -codes.shape[1] :]
        return _reduced(token_log_probs(hidden, self.visual_head, codes), None, reduction)

    def caption_log_probs(
        self, codes: Tensor, captions: Sequence[str | Sequence[int]], reduction: Reduction = "none"
    ) -> Tensor:
        """``log π`` of each caption's tokens given its image, among the text ids: ``(B, longest)``, 0 after its end, or
        ``(B,)``. Texts end with the tokenizer's end of text.
        """
        flat, among = self._caption_terms(codes, captions)
        return _reduced(flat.new_zeros(among.shape).masked_scatter(among, flat), among.sum(1), reduction)

    def _caption_terms(self, codes: Tensor, captions: Sequence[str | Sequence[int]]) -> tuple[Tensor, Tensor]:
        """``log π`` of all tokens of the captions, one caption after the other, and where they stand, bool ``(B,
        longest)``.
        """
        self.check_codes(codes)
        texts = self.text_ids(captions, end=True)
        if len(texts) != len(codes) or not all(texts):
            problem = f"are not one, of at least one token, for each of {len(codes)} images"
            raise invalid("captions", [len(text) for text in texts], problem, "pass as many captions")
        longest = max(map(len, texts))
        padded = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=codes.device)
        lengths = torch.tensor([len(text) for text in texts], device=codes.device)
        among = torch.arange(longest, device=codes.device) < lengths.unsqueeze(1)
        # Padding on the right: nothing that counts looks at it.
        hidden = self(torch.cat([self.image_ids(codes), padded[:, :-1]], 1))[:, -longest:]
        return token_log_probs(hidden[among], self.text_head, padded[among]), among

    def image_loss(self, prompts: Sequence[str | Sequence[int]], codes: Tensor) -> Tensor:
        """Cross-entropy of text → image: the mean over all image tokens; the text carries no loss."""
        return -self.image_log_probs(prompts, codes).mean()

    def caption_loss(self, codes: Tensor, captions: Sequence[str | Sequence[int]]) -> Tensor:
        """Cross-entropy of image → text: the mean over all tokens of the captions; the image carries no loss."""
        return -self._caption_terms(codes, captions)[0].mean()

    def mixed_log_probs(
        self,
        codes: Tensor,
        captioning: Tensor,
        text: Tensor,
        length: Tensor,
        spoken: Tensor,
        low: Tensor | None = None,
        network: nn.Module | None = None,
    ) -> Tensor:
        """``log π`` of images after their captions and of captions after their images in one forward pass, ``(B, max(N,
        L))``, 0 behind the last token; padding stands on the right, where nothing that counts looks at it.

        Args:
            codes: int64 ``(B, N)`` in raster order.
            captioning: bool ``(B,)``, whether the caption follows the image.
            text: int64 ``(B, L)``, ids of the captions with their ends; length: int64 ``(B,)``, without the end;
                spoken: with it.
            low: int64 ``(B, M)``, codes of small images, each of which stands before its image.
            network: what makes the forward pass, the model itself or what wraps it.
        """
        self.check_codes(codes)
        image = self.image_ids(codes)
        image = image if low is None else torch.cat([self.image_ids(low), image], 1)
        tokens, whole, turned = codes.shape[1], image.shape[1], captioning.unsqueeze(1)
        first = torch.where(captioning, whole, length)  # tokens of what comes first
        most = int((first + torch.where(captioning, spoken, whole - 1)).max()) - 1
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        if limit is not None and most > limit:
            problem = f"and a caption make sequences of {most} tokens, and the language model was made for {limit}"
            raise invalid("data.resolution", f"{whole} image tokens", problem, "lower it, or model.max_sequence_length")
        place = torch.arange(most, device=codes.device).expand(len(codes), -1)
        behind = place - first.unsqueeze(1)

        def at(ids: Tensor, places: Tensor) -> Tensor:
            return ids.gather(1, places.clamp(0, ids.shape[1] - 1))

        before = torch.where(turned, at(image, place), at(text, place))
        ids = torch.where(behind < 0, before, torch.where(turned, at(text, behind), at(image, behind)))
        hidden = (network or self)(ids)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        found = hidden.new_zeros(len(codes), max(tokens, text.shape[1]), dtype=dtype)
        drawn, told = (~captioning).nonzero().squeeze(1), captioning.nonzero().squeeze(1)
        if len(drawn) > 0:
            start = (length[drawn] + whole - tokens - 2).unsqueeze(1)  # where the image begins
            states = hidden[drawn.unsqueeze(1), start + torch.arange(tokens, device=codes.device)]
            found[drawn, :tokens] = token_log_probs(states, self.visual_head, codes[drawn])
        elif self.visual_head.requires_grad:  # a step of captions alone has a gradient of it too, which is zero
            found = found + 0 * self.visual_head[0, 0]
        if len(told) > 0:
            among = torch.arange(text.shape[1], device=codes.device) < spoken[told].unsqueeze(1)
            row, column = among.nonzero(as_tuple=True)
            row = told[row]
            states = hidden[row, column + whole - 1]
            found[row, column] = token_log_probs(states, self.text_head, text[row, column])
        return found

    def enable_gradient_checkpointing(self) -> None:
        """Run each layer again in the backward pass instead of keeping its activations."""
        decoder = self.decoder
        older = decoder.gradient_checkpointing_enable  # before transformers had another name for it
        getattr(decoder, "activation_checkpointing_enable", older)({"use_reentrant": False})
        for layer in self.decoder.model.layers:
            layer.training = True  # transformers looks at this; the parts, which may drop out, stay in evaluation mode

    def prompt(self, prompts: Sequence[str | Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and mask ``(B, longest + 1)`` of prompts, padded on the left, and the beginning of an image."""
        texts = self.text_ids(prompts)
        longest = max(map(len, texts), default=0)
        ids = [[0] * (longest - len(text)) + text + [self.begin] for text in texts]
        mask = [[0] * (longest - len(text)) + [1] * (len(text) + 1) for text in texts]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def image_ids(self, codes: Tensor) -> Tensor:
        """Ids ``(B, N + 2)`` of whole images: begin, codes, end."""
        begin = codes.new_full((len(codes), 1), self.begin)
        return torch.cat([begin, codes + self.text_size, begin + 1], 1)


def _reduced(values: Tensor, lengths: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum(1)
    if reduction == "mean":
        return values.sum(1) / (values.shape[1] if lengths is None else lengths)
    raise invalid("reduction", reduction, "is not known", "use none, sum or mean")
