"""A trained model: strings in, strings out."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxformer.batching import bucket, in_windows, pair_batches
from jaxformer.config import BOS_ID, EOS_ID, Precision, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.generation import fewest_positions, max_target_length
from jaxformer.generation_config import GenerationConfig
from jaxformer.generator import Generator, devices_or_all
from jaxformer.lines import check_seed, check_text, checked_lines, refuse_one_string
from jaxformer.loading import CheckpointNames, Member, RunPaths, load_members
from jaxformer.long_lines import Part, join, parts_of
from jaxformer.positions import PositionalEncoding
from jaxformer.results import Alignment, Explanation, Hypothesis, Score
from jaxformer.scoring import (
    alignment_layer,
    attention_alignment,
    attention_maps,
    token_log_probs,
)
from jaxformer.search import BeamResult
from jaxformer.terminal import warn
from jaxformer.tokenizer import Tokenizer

#: How many lines are read, sorted by length and translated together: enough to fill batches with
#: sentences of similar length, few enough that memory stays flat and output begins soon.
WINDOW = 4096


class Translator:
    """Translates lines of text with a trained model, or with several as an ensemble.

        Translator.load("runs/multi30k").translate(["Two men are outside."], beam_size=4)

    Threads may share one. A process forked after JAX has started can use neither it nor any other
    part of JAX: start the process afresh (spawn) and load it there.

    Args:
      config: of the model.
      params: its parameters.
      source_tokenizer, target_tokenizer: the same object if the vocabulary is joint.
      others: further members (config, params) of an ensemble, of the same vocabulary.
      devices: where to translate, by default on all devices of this process.

    Attributes:
      config, params: of the first member; `config.flash_attention` is this machine's choice.
      source_tokenizer, target_tokenizer: as given.

    Raises:
      UserError: `devices` is empty, or has one twice.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: Any,
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
        *,
        others: Sequence[Member] = (),
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self._devices = devices_or_all(devices)
        members = ((config, params), *others)
        self._configs = tuple(self._with_own_kernel(config) for config, _ in members)
        # For everything but the search, which has copies of its own.
        self._params = tuple(jax.device_put(params, self._devices[0]) for _, params in members)
        self.config, self.params = self._configs[0], self._params[0]
        self.source_tokenizer = source_tokenizer
        self.target_tokenizer = target_tokenizer
        self._made: Generator | None = None
        self._making = threading.Lock()

    @classmethod
    def load(
        cls,
        run: RunPaths,
        checkpoint: CheckpointNames = None,
        *,
        dtype: Precision | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> "Translator":
        """Load a run directory, or an ensemble.

        Args:
          run: the directory that training wrote, or several with the same tokenizers.
          checkpoint: "average", "best", "last" or a step; by default the average, unless training
            went on after it was made, otherwise the best, otherwise the last. If several are given,
            the ensemble has a member for each of them in each run.
          dtype: of the computation; by default that of training. int8 means float32, except for
            matrices and the products with them, which are in 8-bit integers.
          devices: as for the class.

        Raises:
          UserError: a directory is incomplete or damaged, or two do not fit together; the message
            says what is missing.
        """
        members, tokenizers = load_members(run, checkpoint, dtype)
        return cls(*members[0], *tokenizers, others=members[1:], devices=devices)

    def translate(self, lines: Sequence[str], **options: Any) -> list[str]:
        """Translate lines; the result has one translation for each, in the same order.

        Args:
          lines: one sentence each. An empty line gives an empty translation.
          **options: as for `generate`, except for `n_best`.

        Raises:
          UserError: as for `generate`.
        """
        return list(self.translate_stream(lines, **options))

    def translate_stream(self, lines: Iterable[str], **options: Any) -> Iterator[str]:
        """Translate lines as they come, a window at a time: input may be of any size.

        Yields one translation for each line, in order; see `translate` for the options.

        Raises:
          UserError: as for `generate`.
        """
        if "n_best" in options:
            raise UserError("n_best is 1 here: call generate for more")
        for hypotheses in self.generate(lines, n_best=1, **options):
            yield hypotheses[0].text

    def generate(
        self,
        lines: Iterable[str],
        *,
        prefixes: Iterable[str] | None = None,
        batch_tokens: int | None = None,
        few_shapes: bool = False,
        window: int = WINDOW,
        seed: int | Iterable[int] = 0,
        warn: Callable[[str], None] = warn,
        **options: Any,
    ) -> Iterator[list[Hypothesis]]:
        """Find the best translations of each line, or sample some.

        Args:
          lines: one sentence each.
          prefixes: what the translation of each line begins with; the first piece after it may
            continue its last word.
          batch_tokens: source positions of a program, over all devices, as in
            `Generator.generate`.
          few_shapes: compile one program for all lines that are not much shorter than the longest,
            instead of one or two for each doubling of the length.
          window: how many lines are read before the first of them is translated. With 1, each line
            is answered before the next is read; a larger window is faster.
          seed: of the noise, if `sampling`; a line's noise depends only on this and its number. Or
            one seed for each line, which is then translated as if it were the only one.
          warn: called with a message that names the line, if it is longer than
            `config.max_length` pieces, eos counted, and so translated in parts, if it has no
            translation, or if its prefix is longer than its translation may be.
          **options: fields of `GenerationConfig`, `beam_size=4` and `n_best=None` among them.

        Yields:
          `n_best` hypotheses for each line in turn, by default all `beam_size`, fewer if no more
          exist; best first, or as drawn. An empty line has one empty hypothesis; so has a line for
          which none exists, with a score of -inf.

        Raises:
          UserError: an option is impossible (raised when the first result is asked for), a line is
            not text, or lines, prefixes and seeds differ in number (after the results before it).
        """
        refuse_one_string(lines, prefixes)
        for name, value in (("window", window), ("batch_tokens", batch_tokens)):
            if value is not None and not (isinstance(value, Integral) and value >= 1):
                raise UserError(f"{name} is {value!r}: give at least 1")
        if not isinstance(seed, Iterable):
            check_seed(seed)
        search = GenerationConfig.of(options)
        first_line = 1
        for given in in_windows(checked_lines(lines, prefixes, seed), window):
            source_ids = self.source_tokenizer.encode_batch([line.text for line in given])
            prefix_ids = self.target_tokenizer.encode_batch([line.prefix for line in given])
            limit, tokenizer = self._most_pieces, self.source_tokenizer
            parts = list(parts_of(source_ids, limit, tokenizer, first_line=first_line, warn=warn))
            begun = [[] if part.number else prefix_ids[part.line - first_line] for part in parts]
            noise = [(*given[part.line - first_line].noise, part.number) for part in parts]
            for part, prefix in zip(parts, begun, strict=True):
                most = max_target_length(self._configs, search, len(part.ids) + 1)
                if len(prefix) > most:
                    warn(
                        f"line {part.line}: its prefix has {len(prefix)} pieces and a translation "
                        f"at most {most}: cut off there"
                    )
            results = self._search(parts, search, begun, batch_tokens, few_shapes, noise)
            found: list[list[list[Hypothesis]]] = [[] for _ in given]
            for part, result in zip(parts, results, strict=True):
                hypotheses = self._hypotheses(result)
                if hypotheses[0].score == -np.inf:
                    warn(
                        f"line {part.line}: no translation that the options allow has a "
                        "probability above 0; it stays empty"
                    )
                found[part.line - first_line].append(hypotheses)
            yield from map(join, found)
            first_line += len(given)

    def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        batch_tokens: int = 4096,
        first_line: int = 1,
    ) -> list[Score]:
        """Log-probability of each target as the translation of its source.

        The numbers are the `log_prob`s that `generate` gives if it finds the same pieces; it ranks
        by these over the length penalty. Every pair is scored as one sentence: `generate` gives
        another number for a line that it translates in parts, or that is empty and not translated.

        Args:
          sources, targets: sentences and their translations, the model's own or not.
          batch_tokens: positions at once.
          first_line: the number of the first pair, for messages.

        Raises:
          UserError: the numbers of lines differ, one is not text, or one is longer than the learned
            positions reach.
        """
        source_ids, target_ids = self._pairs(sources, targets, first_line)
        scores: list[Score] = [Score(0.0, [], [])] * len(source_ids)
        limit = fewest_positions(self._configs)
        for chosen, source, target in pair_batches(source_ids, target_ids, batch_tokens, limit):
            log_probs = token_log_probs(self._configs, self._params, source, target)
            for index, row in zip(chosen, np.asarray(log_probs), strict=False):
                values = [float(value) for value in row[: len(target_ids[index])]]
                tokens = self.target_tokenizer.pieces(target_ids[index])
                scores[index] = Score(float(np.sum(row, dtype=np.float64)), tokens, values)
        return scores

    def align(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        batch_tokens: int = 4096,
        few_shapes: bool = False,
    ) -> list[Alignment]:
        """How much each target piece looked at each source piece, by the (first) model.

        Args:
          sources, targets: sentences and their translations, the model's own or not.
          batch_tokens: positions at once.
          few_shapes: compile one program for all pairs that are not much shorter than the longest.

        Raises:
          UserError: as for `score`.
        """
        return self._align(*self._pairs(sources, targets, 1), batch_tokens, few_shapes)

    def align_hypotheses(
        self,
        lines: Sequence[str],
        hypotheses: Sequence[Sequence[Hypothesis]],
        *,
        batch_tokens: int = 4096,
    ) -> list[list[Alignment | None]]:
        """Where the (first) model looked when it wrote what `generate` found, piece by piece.

        Args:
          lines: the sentences.
          hypotheses: those of each line.
          batch_tokens: positions at once.

        Returns:
          For each line the alignment of each hypothesis; None where the line was translated in
          parts, or the hypothesis leaves no learned position for eos.
        """
        limit, positions = self._most_pieces, fewest_positions(self._configs)
        sources, targets, where = [], [], []
        found: list[list[Alignment | None]] = [[None] * len(each) for each in hypotheses]
        source_ids = self.source_tokenizer.encode_batch(lines)
        for line, (source, each) in enumerate(zip(source_ids, hypotheses, strict=True)):
            for number, hypothesis in enumerate(each):
                target = [*hypothesis.ids, EOS_ID]
                if len(source) <= limit and (positions is None or len(target) <= positions):
                    sources.append([*source, EOS_ID])
                    targets.append(target)
                    where.append((line, number))
        aligned = self._align(sources, targets, batch_tokens, few_shapes=False)
        for (line, number), alignment in zip(where, aligned, strict=True):
            found[line][number] = alignment
        return found

    def _align(
        self,
        source_ids: list[list[int]],
        target_ids: list[list[int]],
        batch_tokens: int,
        few_shapes: bool,
    ) -> list[Alignment]:
        found: list[Any] = [None] * len(source_ids)
        limit = self.config.num_positions
        for chosen, source, target in pair_batches(
            source_ids, target_ids, batch_tokens, limit, few_shapes=few_shapes
        ):
            weights = attention_alignment(self.config, self.params, source, target)
            for index, row in zip(chosen, np.asarray(weights), strict=False):
                found[index] = Alignment(
                    self.source_tokenizer.pieces(source_ids[index]),
                    self.target_tokenizer.pieces(target_ids[index]),
                    row[: len(target_ids[index]), : len(source_ids[index])],
                )
        return found

    def explain(self, line: str, *, seed: int = 0, **options: Any) -> Explanation:
        """Translate a line and keep what the (first) model looked at to write the translation.

        Args:
          line: one sentence, no longer than the model takes at once.
          seed: of the noise, if `sampling`.
          **options: fields of `GenerationConfig`, `beam_size=4` among them. Of several translations
            the first is explained: the best, or with `sampling` the first drawn.

        Raises:
          UserError: the line is empty, too long or not text, or an option is impossible.
        """
        check_text("line", 1, line)
        check_seed(seed)
        ids = self.source_tokenizer.encode(line)
        limit = self._most_pieces
        if not ids:
            raise UserError("there is nothing to explain in an empty line: give a sentence")
        if len(ids) > limit:
            raise UserError(
                f"the sentence has {len(ids)} pieces, more than the model's {limit}: give a part"
            )
        source = [*ids, EOS_ID]
        part, search = Part(line=1, number=0, ids=ids), GenerationConfig.of(options)
        (result,) = self._search([part], search, [[]], len(source), False, [(seed, 1, 0)])
        first = map(int, result.sequences[0][: result.lengths[0]])
        target = [token for token in first if token != EOS_ID]
        positions = fewest_positions(self._configs)
        if positions is not None:
            target = target[: positions - 1]  # one that was cut off may have none left for eos
        target.append(EOS_ID)
        ((_, source_ids, target_ids),) = pair_batches([source], [target], len(source), positions)
        log_probs = token_log_probs(self._configs, self._params, source_ids, target_ids)
        maps = attention_maps(self.config, self.params, source_ids, target_ids)
        S, T = len(source), len(target)
        encoder, decoder, cross = (np.asarray(weights)[:, 0] for weights in maps)
        cross = cross[:, :, :T, :S]
        source_tokens = self.source_tokenizer.pieces(source)
        target_tokens = self.target_tokenizer.pieces(target)
        layer = alignment_layer(self.config)
        return Explanation(
            source=line,
            hypotheses=self._hypotheses(result),
            source_tokens=source_tokens,
            target_tokens=target_tokens,
            decoder_tokens=self.target_tokenizer.pieces([BOS_ID, *target[:-1]]),
            token_log_probs=np.asarray(log_probs)[0, :T],
            encoder_self_attention=encoder[:, :, :S, :S],
            decoder_self_attention=decoder[:, :, :T, :T],
            cross_attention=cross,
            alignment=Alignment(source_tokens, target_tokens, cross[layer].mean(axis=0)),
            positional_encoding=self._positional_encoding(max(S, T)),
        )

    def _positional_encoding(self, length: int) -> np.ndarray:
        """[P, D]: what is added to the source's embeddings at positions 0 … length - 1."""
        computed, positions = bucket(length), self.config.num_positions  # each length compiles anew
        computed = computed if positions is None else min(computed, positions)
        module = PositionalEncoding(self.config.positions, self.config.max_length)
        variables = {"params": self.params.get("source_positions", {})}
        encoding = module.apply(variables, jnp.zeros((1, computed, self.config.d_model)))
        return np.asarray(encoding)[0, :length]

    def _with_own_kernel(self, config: TransformerConfig) -> TransformerConfig:
        """Choose the attention kernel for this machine: the model may come from another one."""
        if config.flash_attention == "none":
            return config
        default = self._devices[0].platform == jax.default_backend()
        return config.replace(flash_attention="auto" if default else "none")

    @property
    def _most_pieces(self) -> int:
        """How many pieces a source that is translated at once may have, without eos."""
        return min(config.max_length for config in self._configs) - 1

    @property
    def generator(self) -> Generator:
        """What it searches with, made when it is first needed."""
        with self._making:  # threads may ask for it at once: one makes it
            if self._made is None:
                self._made = Generator(self._configs, self._params, self._devices)
            return self._made

    def _pairs(
        self, sources: Sequence[str], targets: Sequence[str], first_line: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        refuse_one_string(sources, targets)
        if len(sources) != len(targets):
            raise UserError(f"{len(sources)} sources but {len(targets)} targets: give pairs")
        pairs, limit = [], fewest_positions(self._configs)
        for name, tokenizer, lines in (
            ("source", self.source_tokenizer, sources),
            ("target", self.target_tokenizer, targets),
        ):
            for number, line in enumerate(lines, start=first_line):
                check_text(f"{name} line", number, line)
            ids = [[*line, EOS_ID] for line in tokenizer.encode_batch(lines)]
            for number, row in enumerate(ids, start=first_line):
                if limit is not None and len(row) > limit:
                    raise UserError(
                        f"{name} line {number} has {len(row)} pieces, the model has {limit} "
                        "positions: shorten it"
                    )
            pairs.append(ids)
        return pairs[0], pairs[1]

    def _search(
        self,
        parts: list[Part],
        options: GenerationConfig,
        prefixes: list[list[int]],
        batch_tokens: int | None,
        few_shapes: bool,
        noise: list[tuple[int, int, int]],
    ) -> list[BeamResult]:
        """Search for translations of each part, whose noise follows from its three numbers."""
        sources = [[*part.ids, EOS_ID] for part in parts]
        keys = None
        if options.sampling and parts:
            numbers = np.zeros((bucket(len(noise)), 3), np.uint32)  # each count compiles anew
            numbers[: len(noise)] = np.array(noise, np.int64)
            keys = np.asarray(_keys(*numbers.T))[: len(noise)]
        return self.generator.generate(
            sources,
            options,
            batch_tokens=batch_tokens,
            few_shapes=few_shapes,
            prefixes=prefixes if any(prefixes) else None,
            keys=keys,
        )

    def _hypotheses(self, result: BeamResult) -> list[Hypothesis]:
        hypotheses = []
        for ids, score, log_prob, length in zip(*result, strict=True):
            if np.isfinite(log_prob):
                tokens = [int(token) for token in ids[:length] if token != EOS_ID]
                # One line, also with a foreign tokenizer that has pieces for the ends of lines.
                text = self.target_tokenizer.decode(tokens).replace("\n", " ")
                pieces = self.target_tokenizer.pieces(tokens)
                finished = bool(length) and int(ids[length - 1]) == EOS_ID
                hypotheses.append(
                    Hypothesis(text, float(score), float(log_prob), pieces, tokens, finished)
                )
        return hypotheses or [Hypothesis("", -np.inf, -np.inf, [], [], False)]


@jax.jit
@jax.vmap
def _keys(seed: Array, line: Array, part: Array) -> Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), line), part)
    return jax.random.key_data(key)
