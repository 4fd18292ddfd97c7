"""Rewards that compare the answer in a completion with the row's solution, and how answers are read.

The answer is what stands in the last <answer>...</answer>; in it, or else in the whole text, in the last
\\boxed{}; else it is the whole text. The solution is read the same way; of a list, any one is right.
"""

import math
import operator
import re
import unicodedata
from decimal import Decimal

# ------------------------------------------------------------------------------------------------------------
# The rewards


def accuracy(completions, solution, **_):
    """1.0 if the answer equals the row's solution: as text, as a number, as a choice letter, or, by
    math-verify, as mathematics. Words around the answer make it wrong. None: no solution."""
    return [None if gold is None else float(any(same_answer(final_answer(text), final_answer(one))
                                                for one in golds_of(gold)))
            for text, gold in zip(completions, solution)]


def numeric(completions, solution, **_):
    """1.0 if the one number in the answer equals the one in the solution (R1-V, VLM-R1).

    Words and units around it do not matter; two numbers are wrong. Of an equation, what follows the last
    equals sign counts. 50% is 50 or 0.5, and 1,000 is 1000.
    """
    return compare(read_number, completions, solution, same_number)


def counting(completions, solution, **_):
    """1.0 if the one count in the answer, in digits or as a word up to ninety-nine, is the solution's."""
    return compare(read_count, completions, solution)


def choice(completions, solution, **_):
    """1.0 if the answer names the solution's choice, A to J: alone, "(B) a dog", "the answer is B". A
    solution that is a whole number is the choice's place, from 0 on."""
    return compare(read_choice, completions, solution, kind="choice")


def cosine(completions, solution, completion_ids, max_completion_length, min_value_wrong=-1.0,
           max_value_wrong=-0.5, min_value_correct=0.5, max_value_correct=1.0, **_):
    """`accuracy`, where right answers are worth more when short, and wrong ones when long (arXiv 2502.03373,
    app. C.1; numbers and names are TRL's). With |y| the length in tokens:

        long + (short - long) (1 + cos(pi |y| / max length)) / 2
    """
    rewards = []
    for right, ids, limit in zip(accuracy(completions, solution), completion_ids, max_completion_length):
        if right:
            short, long = max_value_correct, min_value_correct
        else:
            short, long = min_value_wrong, max_value_wrong
        share = min(len(ids) / limit, 1.0)
        reward = long + (short - long) * (1 + math.cos(math.pi * share)) / 2
        rewards.append(None if right is None else reward)
    return rewards


# ------------------------------------------------------------------------------------------------------------
# Comparing


def golds_of(solution, kind: str | None = None) -> list[str]:
    """The answers that a solution accepts: a text, a number, or a list of them; all else is a ValueError.
    kind: of the answers, "iou": a list of numbers is one answer; "choice": a whole number is a letter."""
    found = solution if isinstance(solution, list) else [solution]
    if kind == "choice":
        found = [chr(65 + one) if type(one) is int and 0 <= one < 26 else one for one in found]
    if kind == "iou" and len(found) == 4 and not isinstance(found[0], list | str):
        found = [found]
    if kind == "iou":
        found = [str(one) if isinstance(one, list) else one for one in found]
    for one in found or [None]:
        if (isinstance(one, bool) or not isinstance(one, str | int | float | Decimal) or one == ""
                or isinstance(one, float) and not math.isfinite(one)):
            raise ValueError(f"solution {solution!r:.100}: expected a text, a number or a list of them")
    return [str(one) for one in found]


def compare(read, completions, solution, score=operator.eq, kind: str | None = None):
    """score(read(answer), read(solution)) for each completion, the best of a solution's answers: 0.0 where
    the answer cannot be read, None where the row has no solution. A solution that cannot be read is a
    ValueError."""
    rewards = []
    for text, gold in zip(completions, solution):
        if gold is None:
            rewards.append(None)
            continue
        readings = [read(final_answer(one)) for one in golds_of(gold, kind)]
        known = [one for one in readings if one is not None]
        if not known:
            raise ValueError(f"solution {str(gold)[:100]!r} cannot be read (or is two answers)")
        found = read(final_answer(text))
        rewards.append(0.0 if found is None else float(max(score(found, one) for one in known)))
    return rewards


def same_answer(answer: str, gold: str) -> bool:
    """Whether the two are equal as text, else as numbers, else as choices, else as mathematics."""
    short, known = (plain(text).rstrip(".") for text in (answer, gold))
    short, known = (SAME_WORDS.get(text, text) for text in (short, known))
    if short == known:
        return known != ""

    lettered = re.fullmatch(r"\(?([A-J])(?:\)|[.:](?=\s))\s*(.+)", gold.strip(), re.DOTALL)
    if lettered:  # "A. 5": its letter, its text, or both
        letter = read_choice(answer, leading_only=True)
        return letter == lettered[1] if letter else same_answer(answer, lettered[2])

    short, known = (str(COUNTS.index(text)) if text in COUNTS else text for text in (short, known))
    numbers = [re.fullmatch(NUMBER, text) for text in (short, known)]
    if all(numbers):
        values = [number_of(match) for match in numbers]
        return None not in values and same_number(*values)

    if re.fullmatch(r"\(?[a-j]\)?", known):  # a choice; the answer may be "(B)", "B." or "B: a dog"
        return read_choice(answer, leading_only=True) == known.strip("()").upper()

    if len(answer) > 1000:
        return False  # too long for math-verify
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    # The gold answer comes first. No time limits: the reward process has its own.
    gold, answer = (parse(f"${latex(text)}$", parsing_timeout=None) for text in (gold, answer))
    return verify(gold, answer, timeout_seconds=None)


def needs_math_verify(gold: str) -> bool:
    """Whether accuracy can compare this solution only as mathematics: it has commands, powers or roots."""
    text = plain(final_answer(gold))
    return re.search(r"[\\^\u221a]", text) is not None and read_number(text) is None


def same_number(a, b):
    """Whether two (value, is a percentage) are equal. If only one is a percentage, 50% may be 50 or 0.5."""
    (x, x_percent), (y, y_percent) = a, b
    pairs = [(x, y)]
    if x_percent and not y_percent:
        pairs.append((x / 100, y))
    if y_percent and not x_percent:
        pairs.append((x, y / 100))
    return any(math.isclose(p, q, rel_tol=1e-9, abs_tol=1e-12) for p, q in pairs)


# ------------------------------------------------------------------------------------------------------------
# Finding the answer


def final_answer(text: str) -> str:
    """The text in the last <answer>, in the last \\boxed{}, or all of it (see the top). "" if a box is open:
    what stands in it may be half an answer."""
    opened = list(re.finditer("<answer>", text, re.IGNORECASE))
    if opened:
        text = re.split("</answer>", text[opened[-1].end():], maxsplit=1, flags=re.IGNORECASE)[0]
    boxes = list(re.finditer(r"\\f?box(?:ed)? ?\{", text))
    if not boxes:
        return re.split(r"\n#### ", text)[-1].strip()  # GSM8K's

    begin = boxes[-1].end()
    depth = 1  # of braces
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin:i].strip()
    return ""


SAME_WORDS = {"true": "yes", "false": "no"}
POWERS = {"thousand": 3, "million": 6, "billion": 9}  # of ten
MIXED = r"(?<![\d.])(\d{1,9}) ?\\[dt]?frac\{(\d{1,9})\}\{([1-9]\d{0,8})\}"  # 1\frac{1}{2} is 3/2
UNITS = (  # of areas, volumes and speeds: the first one alone
    r"\b([cdkm]?m|in|ft|yd|mi|units?|inch|feet) ?(?:\^ ?\{?[23]\}?|/ ?(?:s|h|hr|min)\b)", r"\1")
SPELLINGS = (  # (pattern, what is written instead)
    ("[\u2010-\u2015\u2212\uff0d]", "-"),  # hyphens, dashes, minus signs
    (r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1"),
    (r"\^ ?\{? ?\\circ ?\}?|\\degree", "\u00b0"),
    (r"(?<=\d) ?(?:\\times|\\cdot|\u00d7) ?10 ?\^ ?\{?(-?\d+)\}?", r"e\1"),  # 3 x 10^5
    UNITS,
    (r"<AND>", " and "),
    (r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2"),
    (r"\{,\}", ","),  # 1{,}000
    (r"\\[,;!()\[\]]|\\?\$|\*\*", ""),  # spaces and delimiters of LaTeX, dollars, bold
    ("\\\\%|\uff05", "%"),
)


def plain(text: str) -> str:
    """One spelling of digits (of any script), minus signs, fractions and spaces; casefolded."""
    text = "".join(str(unicodedata.decimal(c, c)) for c in unicodedata.normalize("NFC", text))
    text = re.sub(MIXED, lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", text)
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text)
    text = " ".join(text.casefold().split())
    return re.sub(rf"(?<=\d) ({'|'.join(POWERS)})\b", lambda m: f"e{POWERS[m[1]]}", text)


def latex(text: str) -> str:
    """Text as math-verify reads it: roots are commands, mixed numbers fractions; no dollars, plain units."""
    text = re.sub(*UNITS, text.replace("\\$", "").replace("$", ""))
    text = re.sub(MIXED, lambda m: rf"\frac{{{int(m[1]) * int(m[3]) + int(m[2])}}}{{{m[3]}}}", text)
    return re.sub(r"\u221a ?(?:\{([^{}]*)\}|(\w+))", r"\\sqrt{\1\2}", text)


# ------------------------------------------------------------------------------------------------------------
# Reading an answer: each takes a string and returns None where it holds no answer, or two


NUMBER = (  # groups: the number, what it is divided by, the percent sign
    r"([-+]?(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)(?:\.\d*)?(?:e[-+]?\d+)?|[-+]?\.\d+)"
    r"(?: ?/ ?(\d+(?:\.\d+)?))?"
    r" ?(%|percent\b)?")
ALONE = r"(?<![a-z0-9_.^/,])" + NUMBER  # not the tail of a word, power, fraction or longer number
COMPUTED = (  # what may not stand beside the numbers: an operator, a bound, a root, pi; a digit of no NUMBER
    r"[\\^*/<>\u2264\u2265\u00b1\u221a\u00d7\u00f7\u03c0]"
    r"|(?<![a-z0-9_])[-+,.]?\d")


def number_of(match):
    """A match of NUMBER -> (value, is a percentage); None if it is infinite or divided by 0."""
    value, divisor, percent = match.groups()
    divisor = float(divisor or 1)
    if divisor == 0:
        return None
    value = float(re.sub("[, ]", "", value)) / divisor
    return (value, percent is not None) if math.isfinite(value) else None


def numbers_in(text: str) -> list:
    """Each number of a `plain` text as number_of gives it; [] if something is computed or bounded there."""
    text = re.sub(r"\b(?:minus|negative) (?=[\d.])", "-", text)
    rest = re.sub(ALONE, " ", text)
    if re.search(COMPUTED, rest):
        return []
    return [number_of(match) for match in re.finditer(ALONE, text)]


def read_number(text: str):
    """(value, is a percentage) of the one number after the last equals sign."""
    found = numbers_in(re.split("[=\u2248]", plain(text))[-1])
    return found[0] if len(found) == 1 else None


COUNTS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
          "sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
COUNT_WORD = rf"\b(?:(?:{'|'.join(TENS)})(?:-(?:{'|'.join(COUNTS[1:10])}))?|{'|'.join(COUNTS)})\b"
COUNTS += [ten + f"-{one}" * (one != "zero") for ten in TENS for one in COUNTS[:10]]


def read_count(text: str):
    """The one whole number from 0 on; the same count twice is one."""
    text = re.sub(COUNT_WORD, lambda word: str(COUNTS.index(word[0])), plain(text))
    text = re.sub(r"^no \w+\.?$", "0", text)
    found = set(numbers_in(text))
    number = found.pop() if len(found) == 1 else None
    if number is None:
        return None
    value, is_percent = number
    return None if is_percent or value < 0 or value % 1 else int(value)


# One of A to J that stands first: "B", "(b)", "B.", "B: a dog"; not "(A) and (B)", "A/B".
FIRST_CHOICE = (r"(?:(?i:option|choice) )?[(\[]?([A-Ja-j]|[A-Za-z](?=\.?$))(?:[)\]]|[.:](?!\w)|\.?$)"
                r"(?! ?(?:and\b|or\b|[,/(]))")
# One inside a sentence: in capitals, and not the article "A", the pronoun "I", a unit or a variable.
CHOICE_LETTER = (r"(?<![A-Za-z0-9_/])(?<!\w')(?<!\d )"
                 r"([B-HJ]|[AI](?! (?!(?:and|or|is|as|so|because|since)\b)[a-z]))"
                 r"(?!\w|['.]\w|/| ?[=+^])")
NAMED_CHOICE = (r"(?i:answer|option|choice|choose|pick|select|it is|must be)(?i: is|:| option){0,4} ?\(?"
                + CHOICE_LETTER)


def read_choice(text: str, leading_only=False):
    """The letter that the text begins with, else the one it names ("the answer is B"), else the only one."""
    text = " ".join(unicodedata.normalize("NFKC", text).replace("*", "").strip("$ \n").split())
    text = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub("[\u3001\u3002]", ".", text)  # Chinese stops
    text = re.sub(r"(?i:\bnot) \(?[A-J]\b\)?", "", text)
    first = re.match(FIRST_CHOICE, text)
    if first:
        return first[1].upper()
    if leading_only:
        return None
    letters = set(re.findall(NAMED_CHOICE, text) or re.findall(CHOICE_LETTER, text))
    return letters.pop() if len(letters) == 1 else None


READERS = {"numeric": read_number, "counting": read_count, "choice": read_choice}  # by reward
