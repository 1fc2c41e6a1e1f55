"""The recurrent decoder of arXiv 2202.03432: attention over what a CNN says of a slide's patches, and a GRU.

    rows (B, M, C) -> Dense + ReLU -> at each word: Bahdanau attention over rows -> GRU -> two Dense layers -> words

Sizes, optimizer and noise are those of the release (masatsuneki/histopathology-image-caption). It differs in these:

* The release never hands its GRU the state of the word before, which reaches the next through the attention's query
  alone. Here the GRU is recurrent, as the paper describes it.
* It draws words by their probability, another caption at each run. Here the likeliest word is taken: see `generate`.
* It fits its vocabulary on all splits, and lower-cases it. See `WordVocabulary`.
"""

# B slides, M rows of a slide, C their width, E embedding width, H hidden width, T words with <start> and <end>, V words

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD, START, END, UNK = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
"""Words by their numbers."""


class WordVocabulary:
    """The words of the training captions.

    Captions are divided at spaces alone, in their own spelling, so a caption that was learnt comes back as it was. The
    release lower-cases, and drops commas, full stops and hyphens; the metrics ignore case and punctuation, but count
    well-differentiated as another word than well differentiated.

    The release also fits on captions of validation and test, so that it holds words of theirs which no training
    caption has. Here those are <unk>: a test caption may not shape a model that is measured on it.

    Args:
        words: In the order of their numbers, without the four special ones.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._numbers = {word: number for number, word in enumerate(words, start=len(SPECIAL))}

    @classmethod
    def of(cls, captions: Iterable[str]) -> "WordVocabulary":
        """That of captions, which should be those of training only."""
        return cls(sorted({word for caption in captions for word in caption.split()}))

    def __len__(self) -> int:
        """V, with the special words."""
        return len(SPECIAL) + len(self.words)

    def encode(self, caption: str) -> list[int]:
        """Numbers of <start>, the words and <end>."""
        return [START, *(self._numbers.get(word, UNK) for word in caption.split()), END]

    def decode(self, numbers: Iterable[int]) -> str:
        """The words up to <end>, without special ones."""
        words = []
        for number in numbers:
            if number == END:
                break
            if number >= len(SPECIAL):
                words.append(self.words[number - len(SPECIAL)])
        return " ".join(words)


class BahdanauAttention(nn.Module):
    """Additive attention (arXiv 1409.0473): a row's weight is softmax(v tanh(W1 row + W2 state)).

    Args:
        row_dim: Width of rows.
        hidden_dim: Width of the state, and inside.
    """

    def __init__(self, row_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.of_row = nn.Linear(row_dim, hidden_dim)
        self.of_state = nn.Linear(hidden_dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, 1)

    def forward(self, state: Tensor, rows: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """One look.

        Args:
            state: (B, H).
            rows: (B, M, E).
            keys: (B, M, H), `of_row(rows)`, which all words share.
            mask: (B, M), 1 = real; each slide has a real row.

        Returns:
            The weighted mean of the rows (B, E), and the weights (B, M), 0 for padding.
        """
        scores = self.score(torch.tanh(keys + self.of_state(state)[:, None]))[..., 0]  # (B, M)
        weights = scores.masked_fill(mask == 0, -torch.inf).softmax(dim=1)
        return (weights[:, None] @ rows)[:, 0], weights


class RecurrentCaptioner(nn.Module):
    """Writes a caption from any number of rows, of a CNN or of another vision model.

    Args:
        row_width: C.
        vocabulary_size: V.
        embedding_dim: E, of rows and of words.
        hidden_dim: H, of the attention, the GRU and the layer after it.
    """

    def __init__(
        self, row_width: int, vocabulary_size: int, *, embedding_dim: int = 256, hidden_dim: int = 512
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(row_width, embedding_dim)
        self.embedding = nn.Embedding(vocabulary_size, embedding_dim)
        self.attention = BahdanauAttention(embedding_dim, hidden_dim)
        self.gru = nn.GRUCell(2 * embedding_dim, hidden_dim)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)  # no activation after it, as released
        self.output = nn.Linear(hidden_dim, vocabulary_size)

    def forward(self, rows: Tensor, mask: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing: at each word the true ones before it are known.

        Args:
            rows: (B, M, C).
            mask: (B, M), 1 = real, 0 = padding.
            words: (B, T), from <start> to <end>, then <pad>.

        Returns:
            The loss, summed over the words of a caption and averaged over slides as the release has it, and the logits
            (B, T - 1, V) of all words but <start>.
        """
        encoded, keys, state = self._begin(rows)
        steps = []
        for word in words[:, :-1].unbind(dim=1):
            logits, state = self._step(word, state, encoded, keys, mask)
            steps.append(logits)
        logits = torch.stack(steps, dim=1)  # (B, T - 1, V)
        loss = F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten(), ignore_index=PAD, reduction="sum")
        return loss / len(words), logits

    @torch.no_grad()
    def generate(self, rows: Tensor, mask: Tensor, max_words: int) -> Tensor:
        """The likeliest word at each place.

        Greedy, where the release samples: a sampled caption is another one at each run and is on average a worse one,
        and what the baselines stand beside is decoded without chance, too.

        Args:
            rows: (B, M, C).
            mask: (B, M), 1 = real.
            max_words: After so many a caption ends.

        Returns:
            Numbers of words (B, at most `max_words`), <end> after the last and <pad> after that.
        """
        encoded, keys, state = self._begin(rows)
        word = torch.full((len(rows),), START, device=rows.device)
        ended = torch.zeros_like(word, dtype=torch.bool)
        caption: list[Tensor] = []
        while len(caption) < max_words and not ended.all():
            logits, state = self._step(word, state, encoded, keys, mask)
            logits[:, [PAD, START, UNK]] = -torch.inf  # no caption that was learnt from has them
            word = torch.where(ended, PAD, logits.argmax(dim=1))
            ended = ended | (word == END)
            caption.append(word)
        return torch.stack(caption, dim=1)

    def _begin(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encoded rows (B, M, E), their keys (B, M, H), and the state before the first word (B, H)."""
        encoded = F.relu(self.encoder(rows))
        keys = self.attention.of_row(encoded)
        return encoded, keys, keys.new_zeros(len(rows), keys.shape[-1])

    def _step(self, word: Tensor, state: Tensor, encoded: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, V) of the word after `word` (B,), and the new state (B, H)."""
        context, _ = self.attention(state, encoded, keys, mask)  # (B, E)
        state = self.gru(torch.cat([context, self.embedding(word)], dim=1), state)
        return self.output(self.hidden(state)), state


def choose_rows(rows: Tensor, *, max_rows: int, noise: float, seed: str) -> Tensor:
    """What a slide shows the decoder this time.

    Args:
        rows: (M, C).
        max_rows: Of more, so many are drawn; the order has no meaning and is drawn, too.
        noise: Standard deviation of the Gaussian noise on top; 0 outside training.
        seed: The same seed, the same rows and noise.

    Returns:
        (at most `max_rows`, C).
    """
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    rows = rows[torch.randperm(len(rows), generator=generator)[:max_rows]]
    return rows + noise * torch.randn(rows.shape, generator=generator) if noise else rows


def pad_rows(slides: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (M_i, C) of several slides as (B, M, C), and the mask (B, M), 1 = real."""
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(rows), dtype=torch.long) for rows in slides], batch_first=True)
    return nn.utils.rnn.pad_sequence(list(slides), batch_first=True), mask
