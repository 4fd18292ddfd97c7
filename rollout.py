"""KV-cached sampling for groups, and the runner that scores completions in a killable process.

The sampler runs the training module itself: no second engine, no second copy of the weights, nothing to sync.
A prompt and its images are prefilled once; its keys and values then serve all of the group's completions.
Sizes in comments: P prompts, G num_generations, N = P * G completions (group-major), S longest prompt, T
longest completion, R position rows (3 for M-RoPE models, else 1).
"""

import importlib.util
import math
import multiprocessing
import signal
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import DynamicCache

from model import InputError, Interrupted, Policy, Prompt, group_attention_mask, pack_groups, to_device

# ------------------------------------------------------------------------------------------------------------
# Keyed randomness


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer (Steele, Lea, Flood 2014) on int64, whose product wraps as uint64's does."""
    for shift, multiplier in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x


def keyed_uniform(seed: int, draw: torch.Tensor, k: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """fp64 uniforms in [0, 1 - 2^-52] from (seed, draw number, k, token index) alone; int64s that broadcast.

    So there is no generator state to save, and neither the batch a prompt sits in nor the number of ranks nor
    an interrupted rollout can shift what is sampled.
    """
    golden = -0x61C8864680B583EB  # 2^64 / phi, as int64
    x = torch.as_tensor(seed, dtype=torch.int64, device=draw.device)
    for word in (draw, k, t):
        x = _mix((x + 1) * golden + word)
    x = _mix(x * golden)
    return ((x >> 12) & ((1 << 52) - 1)).double() * 2.0**-52


def keep_likely(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    """(N, V) logits, ids outside top_k, top_p or min_p at -inf, in transformers' order. 0, 1.0, 0: all stay.

        top_k  the k most likely ids          min_p  ids of at least min_p times the largest probability
        top_p  the fewest ids, most likely first, whose probabilities sum to top_p or more
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        dropped = p.cumsum(-1) - p >= top_p  # what comes before it is enough already
        logits = logits.masked_fill(dropped.scatter(-1, index, dropped), -math.inf)
    if min_p:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -math.inf)
    return logits


def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: (N, V) logits, (N,) uniforms in [0, 1) -> (N,) ids, never one of probability 0.

    right=True skips entries where the CDF does not rise; u <= 1 - 2^-52 keeps u * total below the total, so
    that the index cannot run off the end. fp64, because in fp32 a CDF over 150k ids forgets its small ones.
    """
    cdf = logits.double().softmax(-1).cumsum(-1)                                    # (N, V)
    return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------
# Sampling


class Rollout(NamedTuple):
    """N = P * G completions, group-major: completion i belongs to prompt i // G."""

    completion_ids: torch.Tensor   # (N, T) padded with pad_id; these ids are trained, never re-encoded text
    completion_mask: torch.Tensor  # (N, T) True up to the first EOS, which is included
    sampling_logps: torch.Tensor   # (N, T) log-probs at the sampling temperature, 0 where the mask is False
    truncated: torch.Tensor        # (N,) True where max_completion_length came before an EOS


@torch.no_grad()
def sample(policy: Policy, prompts: list[Prompt], draws: list[int], *, num_generations: int,
           max_completion_length: int, temperature: float, seed: int, top_k: int = 0, top_p: float = 1.0,
           min_p: float = 0.0, stop=None) -> Rollout:
    """num_generations completions of every prompt; temperature 0 is greedy (log-probs are then those at 1).

    top_k, top_p and min_p narrow what is drawn, not the log-probs returned: those are of the whole softmax,
    which is what the trainer computes. stop() is asked every 8 tokens; if True, Interrupted is raised.

    draws: the prompts' draw numbers, which key the randomness. Results come back on the CPU. Completion
    lengths differ freely; rows that have ended leave the batch every 8 tokens, at which point alone the
    device is asked whether all have ended. Runs in eval() mode and restores the mode it found.
    """
    P, G, device = len(prompts), num_generations, policy.device
    N, T, was_training = P * G, max_completion_length, policy.training
    policy.eval()
    batch = to_device(pack_groups([(prompt, []) for prompt in prompts], policy.pad_id), device)
    lengths = (batch["segment_ids"] == 0).sum(-1)                                               # (P,)
    R, S = len(batch["position_ids"]), batch["input_ids"].shape[1]
    cache, eos = DynamicCache(), torch.tensor(policy.eos_ids, device=device)
    with policy.autocast():
        mask = group_attention_mask(batch["segment_ids"], batch["group_ids"])                   # (P, 1, S, S)
        hidden = policy.hidden(batch["input_ids"], batch["position_ids"], mask, batch["pixels"], cache)
    # Everything below is per completion: row n continues prompt n // G.
    hidden = hidden[torch.arange(P, device=device), lengths - 1].repeat_interleave(G, 0)        # (N, H)
    cache.batch_repeat_interleave(G)
    next_position = torch.stack([p.positions.max() + 1 for p in prompts]).to(device)            # (P,)
    next_position = next_position.repeat_interleave(G)                                          # (N,)
    # The columns a completion may attend to: its prompt without the padding, then its own tokens.
    visible = torch.ones(N, S + T, dtype=torch.bool, device=device)
    visible[:, :S] = (batch["segment_ids"] == 0).repeat_interleave(G, 0)
    uniforms = keyed_uniform(seed, torch.tensor(draws, device=device).repeat_interleave(G)[:, None],
                             torch.arange(G, device=device).repeat(P)[:, None],
                             torch.arange(T, device=device)[None])                              # (N, T)

    ids = torch.full((N, T), policy.pad_id, device=device)
    logps, alive = torch.zeros(N, T, device=device), torch.zeros(N, T, dtype=torch.bool, device=device)
    rows = torch.arange(N, device=device)  # which completion each row of the shrinking batch is
    running = torch.ones(N, dtype=torch.bool, device=device)
    for t in range(T):
        logits = policy.logits(hidden, temperature or 1.0)                              # (rows, V)
        likely = keep_likely(logits, top_k, top_p, min_p)
        token = sample_tokens(likely, uniforms[rows, t]) if temperature else logits.argmax(-1)
        ids[rows, t] = torch.where(running, token, policy.pad_id)
        logp = logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)            # (rows,)
        logps[rows, t] = torch.where(running, logp, 0.0)
        alive[rows, t] = running
        running = running & ~torch.isin(token, eos)
        if t % 8 == 7 or t == T - 1:
            if stop is not None and stop():
                raise Interrupted
            left = running.nonzero().squeeze(-1)
            if len(left) == 0 or t == T - 1:
                break
            if len(left) < len(rows):
                cache.batch_select_indices(left)
                rows, running, token = rows[left], running[left], token[left]
        with policy.autocast():
            positions = (next_position[rows] + t).expand(R, -1)[..., None]              # (R, rows, 1)
            mask = visible[rows, None, None, :S + t + 1]                                # (rows, 1, 1, S+t+1)
            hidden = policy.hidden(token[:, None], positions, mask, cache=cache)[:, 0]  # (rows, H)
    policy.train(was_training)
    longest = max(1, int(alive.sum(-1).max()))
    truncated = ~torch.isin(ids, eos).logical_and(alive).any(-1)
    return Rollout(*(x[:, :longest].cpu() for x in (ids, alive, logps)), truncated.cpu())


# ------------------------------------------------------------------------------------------------------------
# Rewards, in a process of their own


class RewardError(InputError):
    """A reward function raised, hung, died, or did not return one finite number or None a completion."""


def _load_function(spec: str):
    """'file.py:function' -> the function. The file is run by its path; importing it must do nothing else."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise RewardError(f"reward {spec}: no such file {path!r} "
                          "(expected a built-in name or path/to/file.py:function)")
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise RewardError(f"reward {spec}: {path} has no function {name!r}")
    return getattr(module, name)


def _reward_child(connection, specs: list[str]):
    """The child's loop: receive (function index, columns), send ("ok", rewards), or ("error", traceback) and
    then ("row", index), the first row on which the function raises by itself (None: on none)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches every process; the run decides when to end
    try:
        functions = [_load_function(spec) for spec in specs]
    except BaseException as error:
        text = str(error) if isinstance(error, RewardError) else traceback.format_exc()
        return connection.send(("error", text))
    connection.send(("ok", None))
    while True:
        try:
            index, columns = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("ok", functions[index](**columns)))
        except Exception:
            connection.send(("error", traceback.format_exc()))  # at once: the search below may be slow
            culprit = None
            for i in range(len(columns["completions"])):
                try:
                    functions[index](**{k: v[i:i + 1] for k, v in columns.items()})
                except Exception:
                    culprit = i
                    break
            connection.send(("row", culprit))


class RewardRunner:
    """Reward functions in one persistent `spawn`ed child: a hang or a crash there is a clear error here.

    specs: "file.py:function". A function is called as in TRL, f(prompts=, completions=, **columns), each a
    list over the completions, and returns one finite number a completion, or None to abstain. It is not a
    sandbox: the function runs with this user's rights.
    """

    def __init__(self, specs: list[str], timeout: float = 60.0):
        self.specs, self.timeout, self.ready = specs, timeout, False
        context = multiprocessing.get_context("spawn")  # not fork: the parent has threads, and may have a GPU
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_reward_child, args=(child, specs), daemon=True)
        self.process.start()
        child.close()

    def _ask(self, what: str, question, timeout: float):
        """Send a question (None: none), return the child's next message; death or silence is an error."""
        try:
            if question is not None:
                self.connection.send(question)
            if not self.connection.poll(timeout):
                self.close()
                raise RewardError(f"{what}: no answer within {timeout:g} s (--reward_timeout); "
                                  "its process was killed")
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RewardError(f"{what}: its process died (exit code {self.process.exitcode})") from None

    def wait_until_ready(self):
        """Block until the child has loaded every function; an error here is an error of the file."""
        if not self.ready:
            status, text = self._ask(f"loading rewards {', '.join(self.specs)}", None, 300)
            if status == "error":
                raise RewardError(text.strip())
            self.ready = True

    def score(self, completions: list[str], rows: list[dict], step: int, **more) -> torch.Tensor:
        """(functions, N) fp64, nan where a function abstained. rows: the dataset row of each completion;
        more: further columns, such as TRL's completion_ids."""
        self.wait_until_ready()
        hidden = {"images", "chosen", "rejected"}  # pixels stay out of the pipe; answers are not prompts
        names = [k for k in dict.fromkeys(k for row in rows for k in row)
                 if k not in hidden and not k.startswith("_")]
        columns = {name: [row.get(name) for row in rows] for name in names}
        columns["prompts"], columns["completions"] = columns.pop("prompt"), completions
        columns |= more
        return torch.stack([self._score_one(i, columns, rows, step) for i in range(len(self.specs))])

    def _score_one(self, index: int, columns: dict, rows: list[dict], step: int) -> torch.Tensor:
        completions, what = columns["completions"], f"reward {self.specs[index]}, step {step}"

        def at(i):
            return f"row {rows[i]['_source']}, completion {completions[i][:200]!r}"

        status, result = self._ask(what, (index, columns), self.timeout)
        if status == "error":
            hint = ""
            if "string indices must be integers" in result:
                hint = ("\n(completions are strings here, not message lists: "
                        "use completion, not completion[0]['content'])")
            elif "unexpected keyword argument" in result:
                hint = "\n(it is called with every column of the dataset: give it a **kwargs)"
            try:
                _, culprit = self._ask(what, None, self.timeout)
            except RewardError:  # the search took too long; the traceback of the whole batch says enough
                culprit = None
            where = f"a batch of {len(rows)} rows" if culprit is None else at(culprit)
            raise RewardError(f"{what} raised on {where}:\n{result.strip()}{hint}")
        if not isinstance(result, (list, tuple)) and not hasattr(result, "tolist"):
            raise RewardError(f"{what}: expected a list of {len(rows)} numbers, got {type(result).__name__}")
        result = list(result.tolist() if hasattr(result, "tolist") else result)
        if len(result) != len(rows):
            raise RewardError(f"{what}: expected {len(rows)} rewards, one a completion, got {len(result)}")
        for i, value in enumerate(result):
            try:
                number = math.nan if value is None else float(value)
            except (TypeError, ValueError):
                raise RewardError(f"{what}: {value!r} is not a number; {at(i)}") from None
            if value is not None and not math.isfinite(number):
                raise RewardError(f"{what}: returned {number} (None abstains, nan does not); {at(i)}")
            result[i] = number
        return torch.tensor(result, dtype=torch.float64)

    def close(self):
        self.process.kill()
        self.process.join()
        self.connection.close()


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(policy: Policy, processor, rows: list[dict], draws: list[int], encode, rewards: RewardRunner, *,
             temperature: float, max_completion_length: int, batch_size: int, seed: int, step: int,
             stop=None):
    """One answer to every held-out row -> (texts, rewards (functions, rows)); temperature 0 is greedy.

    draws: the rows' numbers among all ranks' rows, which key the randomness. encode(row) -> Prompt; rows are
    encoded batch by batch, so that never all pixels are in memory at once.
    """
    texts, ids = [], []
    for i in range(0, len(rows), batch_size):
        prompts = [encode(row) for row in rows[i:i + batch_size]]
        result = sample(policy, prompts, draws[i:i + batch_size], num_generations=1,
                        temperature=temperature, max_completion_length=max_completion_length, seed=seed,
                        stop=stop)
        texts += decode(processor, result)
        ids += id_lists(result)
    return texts, rewards.score(texts, rows, step, completion_ids=ids,
                                max_completion_length=[max_completion_length] * len(rows))


def decode(processor, rollout: Rollout) -> list[str]:
    """The completions as text, special tokens (EOS among them) left out."""
    return [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in id_lists(rollout)]


def id_lists(rollout: Rollout) -> list[list[int]]:
    """Each completion's token ids, EOS included."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.completion_mask)]
