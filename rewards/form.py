"""Rewards for the form of a completion: its tags, its repetitions, its length. None needs a solution."""

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def think_format(completions, **_):
    """--reward_funcs format: 1.0 for <think>...</think><answer>...</answer>, each tag once, nothing around
    them (R1-V). Both may span lines."""
    return [float(all(text.count(tag) == 1 for tag in TAGS) and FORMAT.fullmatch(text) is not None)
            for text in completions]


def think_format_reward(completions, **_):
    """TRL's reward of this name: 1.0 for <think>...</think> and then any text, <think> once and first."""
    return [float(re.match(r"<think>(?!.*<think>).*?</think>", text, re.DOTALL) is not None)
            for text in completions]


def tag_count(completions, **_):
    """0.25 for each of the four tags of `format` that stands exactly once (open-r1, without its newlines)."""
    return [sum(text.count(tag) == 1 for tag in TAGS) / 4 for text in completions]


def repetition_penalty(completions, completion_ids, ngram_size=3, max_penalty=-1.0, **_):
    """max_penalty times the share of token n-grams that occurred before (arXiv 2502.03373, app. C.2)."""
    rewards = []
    for ids in completion_ids:
        count = max(len(ids) - ngram_size + 1, 0)
        unique = len(set(zip(*(ids[i:] for i in range(ngram_size)))))
        rewards.append(max_penalty * (1 - unique / count) if count else 0.0)
    return rewards


def soft_overlong(completions, completion_ids, max_completion_length, soft_punish_cache=0.2, **_):
    """0 up to max length - cache, then falling linearly to -1 at max length (DAPO, arXiv 2503.14476 eq. 13).
    soft_punish_cache: tokens, or below 1 a share of the max length; the paper has 4096 of 20480."""
    rewards = []
    for ids, limit in zip(completion_ids, max_completion_length):
        cache = limit * soft_punish_cache if soft_punish_cache < 1 else soft_punish_cache
        beyond = max(len(ids) - limit + cache, 0)
        rewards.append(-min(beyond / cache, 1.0))
    return rewards


def finished(completions, truncated, **_):
    """1.0 for an answer that ended by itself, 0.0 for one that was cut at --max_completion_length. With a
    weight of P this is TRL's missing_eos_penalty P, up to a constant."""
    return [float(not cut) for cut in truncated]
