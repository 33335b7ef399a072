"""The metrics of LongBench, InfiniteBench and LV-Eval, as their published scorers define them.

Every metric takes a prediction and one right answer and returns a score in [0, 1]; a bool counts as 0 or 1. Where a
published scorer and its paper disagree, the scorer is followed, since the published figures come from it. Metrics of
Chinese words take `cut`, a segmenter such as `jieba.lcut`.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence

Cut = Callable[[str], Sequence[str]]

_CHINESE_PUNCTUATION = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001, E501
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def characters(text: str) -> str:
    """Lower-case text without punctuation and spaces, Chinese or not."""
    return "".join(text.lower().translate(_NO_CHINESE_PUNCTUATION).split())


def words_zh(text: str, cut: Cut) -> list[str]:
    """The words that `cut` finds, each without punctuation; those of nothing else are left out."""
    return [word for word in map(characters, cut(text)) if word]


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of two bags of tokens."""
    shared = sum((Counter(prediction) & Counter(answer)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of `words`."""
    return f1(words(prediction), words(answer))


def qa_f1_zh(prediction: str, answer: str, *, cut: Cut) -> float:
    """F1 of Chinese words."""
    return f1(words_zh(prediction, cut), words_zh(answer, cut))


def character_f1(prediction: str, answer: str) -> float:
    """F1 of single characters (InfiniteBench's Chinese questions)."""
    return f1(characters(prediction), characters(answer))


def keyword_f1(prediction: str, answer: str, *, keywords: str | None, blacklist: Collection[str]) -> float:
    """LV-Eval's F1 in two stages: 0 unless a fifth of the answer's keywords are found, else `qa_f1`.

    Words of the blacklist do not count as found. The paper drops them from the F1 as well; its scorer does not.
    """
    if keywords and _recall(words(prediction), words(keywords), blacklist) < 0.2:
        return 0.0
    return qa_f1(prediction, answer)


def keyword_f1_zh(prediction: str, answer: str, *, keywords: str | None, blacklist: Collection[str], cut: Cut) -> float:
    """`keyword_f1` of Chinese words: two fifths must be found, and the answer serves where there are no keywords."""
    found = words_zh(prediction, cut)
    if _recall(found, words_zh(keywords or answer, cut), blacklist) < 0.4:
        return 0.0
    return f1(found, words_zh(answer, cut))


def _recall(prediction: Sequence[str], keywords: Sequence[str], blacklist: Collection[str]) -> float:
    shared = Counter(prediction) & Counter(keywords)
    return sum(count for word, count in shared.items() if word not in blacklist) / max(1, len(keywords))


def rouge_l(prediction: str, answer: str) -> float:
    """Summary-level ROUGE-L as PyPI's `rouge` 1.0.1 computes it: over sets of words, sentences ending at ".".

    That package recurses over the words of a sentence, and the published scorers give 0 where Python's limit stops it
    (sentences of about a thousand words, both together). Here such sentences are scored.
    """
    theirs, ours = ([part.split() or [""] for part in text.split(".") if part] for text in (answer, prediction))
    if not theirs or not ours:
        return 0.0
    union = {
        reference[index]
        for reference in theirs
        for candidate in ours
        for index in _common(reference, candidate, keep_reference=True)
    }
    precision, recall = (len(union) / len(set().union(*sentences)) for sentences in (ours, theirs))
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(prediction: str, answer: str, *, cut: Cut) -> float:
    """`rouge_l` of Chinese words."""
    return rouge_l(" ".join(cut(prediction)), " ".join(cut(answer)))


def filtered_rouge_l_zh(prediction: str, answer: str, *, blacklist: Collection[str], cut: Cut) -> float:
    """`rouge_l` of Chinese words without those of LV-Eval's blacklist; its scorer segments twice."""

    def rest(text: str) -> str:
        found = map(characters, cut(" ".join(cut(text))))
        return " ".join(word for word in found if word not in blacklist)

    return rouge_l(rest(prediction), rest(answer))


def rouge_lsum(prediction: str, answer: str) -> float:
    """ROUGE-Lsum as Google's `rouge_score` computes it: sentences end at newlines, no stemming."""
    theirs, ours = (
        [re.findall(r"[a-z0-9]+", line.lower()) for line in text.split("\n") if line] for text in (answer, prediction)
    )
    left, right = (Counter(word for sentence in sentences for word in sentence) for sentences in (theirs, ours))
    total, hits = left.total() + right.total(), 0
    for reference in theirs:
        union = {index for candidate in ours for index in _common(reference, candidate, keep_reference=False)}
        for word in (reference[index] for index in union):
            if left[word] and right[word]:
                hits, left[word], right[word] = hits + 1, left[word] - 1, right[word] - 1
    return 2 * hits / total if hits else 0.0


def _common(reference: Sequence[str], candidate: Sequence[str], *, keep_reference: bool) -> list[int]:
    """Indices into `reference` of a longest common subsequence.

    There may be several, and the two ROUGE packages do not find the same one: read from the end, where skipping a word
    of either loses nothing, it is one of the candidate if `keep_reference`, else one of the reference.
    """
    lengths = [[0] * (len(candidate) + 1)]
    for word in reference:
        above, row = lengths[-1], [0]
        for column, other in enumerate(candidate):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        lengths.append(row)
    i, j = len(reference), len(candidate)
    found = []
    while i and j:
        up, left = lengths[i - 1][j], lengths[i][j - 1]
        if reference[i - 1] == candidate[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif up > left or (up == left and not keep_reference):
            i -= 1
        else:
            j -= 1
    return found


def classification(prediction: str, answer: str, *, classes: Sequence[str]) -> float:
    """One over the number of classes named in the prediction, if the right one is among them.

    A class whose name is part of the right one's does not count. The published loop removes such classes from the list
    that it walks, and so passes over the one that follows each; so does this.
    """
    named = [name for name in classes if name in prediction]
    index = 0
    while index < len(named):
        if named[index] in answer and named[index] != answer:
            named.remove(named[index])
        index += 1
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, *, pattern: str = r"Paragraph (\d+)") -> float:
    """Share of the prediction's numbers that are the right paragraph's."""
    match = re.search(pattern, answer)
    if match is None:
        raise ValueError(f"answers: {answer!r} names no paragraph ({pattern})")
    return count(prediction, match[1])


def retrieval_zh(prediction: str, answer: str) -> float:
    """`retrieval` where answers read "段落1"."""
    return retrieval(prediction, answer, pattern=r"段落(\d+)")


def count(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str) -> float:
    """Edit similarity of the first line that holds neither a backtick nor a comment, in whole percent.

    `fuzzywuzzy.fuzz.ratio` with the published requirements, which do not install python-Levenshtein: the ratio of
    difflib. With python-Levenshtein, which fuzzywuzzy takes where it finds it, scores differ by some percent.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == answer:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100 if line and answer else 0.0


def first_number(prediction: str, answer: str) -> bool:
    """The first run of digits is the answer."""
    match = re.search("[0-9]+", prediction)
    return match is not None and match[0] == answer


def key_value(prediction: str, answer: str) -> bool:
    """The answer is one of the words, sentence marks and braces aside."""
    return answer in _spaced(prediction, "\n:\"'.,?!{}").split()


def speaker(prediction: str, answer: str) -> bool:
    """The name, in capitals, is one of the words in capitals."""
    return answer in _spaced(prediction, "\n:\"'.,?!{}").upper().split()


def code_run(prediction: str, answer: int) -> bool:
    """The last word is the number."""
    found = _spaced(prediction, "\n.`'\":").split()
    try:
        return bool(found) and int(found[-1]) == answer
    except ValueError:
        return False


def code_debug(prediction: str, answer: tuple[str, str]) -> bool:
    """The option's letter comes first, or it or the function's name comes after "is:" or the like.

    Args:
      prediction: what the model wrote.
      answer: the function's name and the option's letter.
    """
    name, letter = answer
    text = prediction.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return True
    for mark in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        text = text.replace(mark, " ")
    after = _after(re.sub(" +", " ", text), ("answer is:", "is:", "answer:", "correct option is:"))
    return after is not None and after.startswith((letter, name))


def choice(prediction: str, answer: tuple[str, str]) -> bool:
    """The option's letter comes first, after "answer is" or the like, or is the first of the four anywhere.

    Args:
      prediction: what the model wrote.
      answer: the option's text and its letter.
    """
    text = prediction.strip()
    if not text:
        return False
    if text[0] in "ABCD":
        return text[0] in answer
    if text in answer:
        return True
    text = re.sub(" +", " ", _spaced(text, "\n\"'.,?!{}"))
    after = _after(text, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return after.startswith(answer)
    return next((word for word in text.split() if word in "ABCD"), None) in answer


def math_find(prediction: str, answer: float) -> bool:
    """The first number, with decimals or without, is the answer."""
    match = re.search(r"\d+\.\d+|\d+", prediction)
    return match is not None and float(match[0]) == answer


def math_calc(prediction: str, answer: Sequence[int]) -> float:
    """Share of the intermediate values that are right, up to the first that is not; signs are not looked at."""
    right = 0
    for found, value in zip(re.findall("[0-9]+", prediction), answer, strict=False):
        if (found.lstrip("0") or "0") != str(value):  # as text: Python refuses integers of many thousand digits
            break
        right += 1
    return right / len(answer)


def _spaced(text: str, marks: str) -> str:
    """The text with spaces in the marks' places."""
    return text.translate(str.maketrans(marks, " " * len(marks)))


def _after(text: str, cues: Sequence[str]) -> str | None:
    """What follows the first cue, in the order of `cues`, that the text holds, and the character behind it."""
    for cue in cues:
        if cue in text:
            return text[text.index(cue) + len(cue) + 1 :]
    return None
