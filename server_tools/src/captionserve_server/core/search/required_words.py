"""What rows have, and lack, of the words that their caption must contain.

A row's progress is one number a word, as Knuth, Morris and Pratt search for it, and a new token
moves it by a look into a table; what a caption had before is never read again. A token that no word
has takes all progress away, so that only the others need a column of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captionserve_server.core.step_model import BoolArray, Int64Array
from captionserve_server.core.words import ForcedWord, TokenIds


@dataclass(frozen=True)
class RequiredWords:
    """The words of one caption as tables.

    A move is one of the words with one of the tokens that it is made of. Moves stand by token, then
    by word.

    Attributes:
        lengths: [words], tokens of each one's longer form.
        tokens: [tokens], those of all words, ascending.
        token: [moves], which of the tokens.
        word: [moves], which of the words.
        of_token: [tokens], the first move of each token.
        by_word: [moves], the moves by word, then by token.
        of_word: [words], the first move of each word among those.
        spaced: [moves, progress], the progress in the word's spaced form after the token; beyond
            the form's length, 0.
        initial: [moves, begin], how much of the initial form there is after the token, where the
            caption consists of its first tokens, `begin` of them; else 0.
        spaced_length: [moves], tokens of the word's spaced form.
        initial_length: [moves], of its initial form; 0 where it has none.
    """

    lengths: Int64Array
    tokens: Int64Array
    token: Int64Array
    word: Int64Array
    of_token: Int64Array
    by_word: Int64Array
    of_word: Int64Array
    spaced: Int64Array
    initial: Int64Array
    spaced_length: Int64Array
    initial_length: Int64Array

    @classmethod
    def of(cls, words: Sequence[ForcedWord]) -> RequiredWords:
        """The tables for some words."""
        spaced_length = np.array([len(word.spaced) for word in words], np.int64)
        initial_length = np.array([len(word.initial or ()) for word in words], np.int64)
        longest = int(max(spaced_length.max(initial=0), initial_length.max(initial=0)))
        spaced, initial = [np.zeros((0, longest), np.int64)], [np.zeros((0, longest), np.int64)]
        moves: list[tuple[int, int]] = []
        for number, word in enumerate(words):
            own = sorted({*word.spaced, *(word.initial or ())})
            moves += [(token, number) for token in own]
            spaced.append(_transitions(word.spaced, own, longest))
            initial.append(_beginnings(word.initial or (), own, longest))
        order = sorted(range(len(moves)), key=moves.__getitem__)
        token, word_of = np.array(moves, np.int64).reshape(-1, 2)[order].T
        tokens, of_token = np.unique(token, return_index=True)
        by_word = np.argsort(word_of, kind="stable")
        return cls(
            lengths=np.maximum(spaced_length, initial_length),
            tokens=tokens,
            token=np.searchsorted(tokens, token),
            word=word_of,
            of_token=of_token,
            by_word=by_word,
            of_word=np.searchsorted(word_of[by_word], np.arange(len(words))),
            spaced=np.concatenate(spaced)[order],
            initial=np.concatenate(initial)[order],
            spaced_length=spaced_length[word_of],
            initial_length=initial_length[word_of],
        )

    def columns(self, tokens: Int64Array) -> Int64Array:
        """Which of `tokens` each one is; one column more for all that are none of them."""
        found = np.searchsorted(self.tokens, tokens)
        known = np.append(self.tokens, -1)[found] == tokens
        return np.where(known, found, len(self.tokens))


def _transitions(form: TokenIds, tokens: Sequence[int], longest: int) -> Int64Array:
    """The search automaton of a form: [tokens, longest], the progress after each from each."""
    columns = [tokens.index(token) for token in form]
    table = np.zeros((longest, len(tokens)), np.int64)
    # The progress without the first token: a token that does not fit does what it does there.
    shorter = 0
    for progress, column in enumerate(columns):
        table[progress] = table[shorter]
        shorter = int(table[shorter, column]) if progress else 0
        table[progress, column] = progress + 1
    return table.T


def _beginnings(form: TokenIds, tokens: Sequence[int], longest: int) -> Int64Array:
    """Where each token carries a form on that is all there is: [tokens, longest]."""
    table = np.zeros((longest, len(tokens)), np.int64)
    for begin, token in enumerate(form):
        table[begin, tokens.index(token)] = begin + 1
    return table.T


@dataclass(frozen=True)
class Prospects:
    """What becomes of rows by their next token; the last column stands for all other tokens.

    Attributes:
        banks: [rows, tokens + 1], tokens of all words that are there, and of the one that has come
            farthest.
        complete: bool [rows, tokens + 1], whether every word is there.
        advancing: bool [rows, tokens + 1], whether the token brings a lacking word forward.
        spaced: [rows, moves], the progress of each move's word.
        begins: bool [rows, moves], whether the beginning of its initial form is all there is.
        met: bool [rows, moves], whether the word is there by this token.
    """

    banks: Int64Array
    complete: BoolArray
    advancing: BoolArray
    spaced: Int64Array
    begins: BoolArray
    met: BoolArray


@dataclass(frozen=True)
class Progress:
    """How far the rows of one caption have come with its words.

    Attributes:
        words: the words.
        generated: tokens that each row has.
        lacking: bool [rows, words], whether the word is not there.
        prospects: what the next token makes of it.
    """

    words: RequiredWords
    generated: int
    lacking: BoolArray
    prospects: Prospects

    @classmethod
    def begin(cls, words: Sequence[ForcedWord], rows: int) -> Progress:
        """Before the first token."""
        tables, shape = RequiredWords.of(words), (rows, len(words))
        everything = np.ones(shape, np.bool_)
        prospects = _prospects(tables, 0, np.zeros(shape, np.int64), everything, everything)
        return cls(tables, 0, everything, prospects)

    @property
    def complete(self) -> BoolArray:
        """[rows], whether every word is there."""
        complete: BoolArray = ~self.lacking.any(axis=1)
        return complete

    def followed_by(self, rows: Int64Array, tokens: Int64Array) -> Progress:
        """That of other rows, each a row of these, [rows], with one token more, [rows]."""
        words, prospects = self.words, self.prospects
        taken = (words.token == words.columns(tokens)[:, None])[:, words.by_word]
        moves = rows[:, None], words.by_word

        def each_word(of_moves: BoolArray) -> BoolArray:
            """Bool [rows, moves by word] to [rows, words], of the token that was taken."""
            return np.logical_or.reduceat(taken & of_moves, words.of_word, axis=1)

        spaced = np.maximum.reduceat(taken * prospects.spaced[moves], words.of_word, axis=1)
        begins = each_word(prospects.begins[moves])
        lacking = self.lacking[rows] & ~each_word(prospects.met[moves])
        generated = self.generated + 1
        return Progress(
            words, generated, lacking, _prospects(words, generated, spaced, begins, lacking)
        )


def _prospects(
    words: RequiredWords,
    generated: int,
    spaced: Int64Array,
    begins: BoolArray,
    lacking: BoolArray,
) -> Prospects:
    """What the next token makes of rows.

    Args:
        words: the words.
        generated: tokens that each row has.
        spaced: [rows, words], how many tokens of the spaced form end the row.
        begins: bool [rows, words], whether the row is the beginning of the initial form.
        lacking: bool [rows, words], whether the word is not there.
    """
    before, open_ = spaced[:, words.word], lacking[:, words.word]
    # A word that is there may have run through its form, where the table ends; it does not count.
    after = words.spaced[np.arange(len(words.word)), before * open_]
    initial = np.zeros_like(after)
    if generated < words.initial.shape[1]:
        initial = words.initial[:, generated] * begins[:, words.word]
    still_begins = initial > 0
    met = open_ & (
        (after == words.spaced_length) | (still_begins & (initial == words.initial_length))
    )
    begun = np.maximum(after, initial) * (open_ & ~met)
    advancing = open_ & ((after > before) | still_begins)
    there, missing = ~lacking @ words.lengths, lacking.sum(axis=1)
    by_token = words.of_token
    found = np.add.reduceat(met * words.lengths[words.word], by_token, axis=1)
    farthest = np.maximum.reduceat(begun, by_token, axis=1)
    newly = np.add.reduceat(met, by_token, axis=1, dtype=np.int64)
    return Prospects(
        banks=np.column_stack((there[:, None] + found + farthest, there)),
        complete=np.column_stack((newly == missing[:, None], missing == 0)),
        advancing=np.column_stack(
            (np.logical_or.reduceat(advancing, by_token, axis=1), np.zeros_like(missing, np.bool_))
        ),
        spaced=after,
        begins=still_begins,
        met=met,
    )
