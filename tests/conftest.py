"""Tiny random models of the real classes, written by save_pretrained and read back by the program's own loader."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import functools
import random
import signal
import subprocess
import sys
import tempfile
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import losses
import model
import papers
import rollout
from rewards import process, runner

# {name: module} of every file of papers/: tests that go over the tables of losses.py cover its methods, too.
METHODS = {name: papers.load_method(name, script) for script in ("train_dpo.py", "train_grpo.py")
           for name in papers.papers_for(script).split(", ")}

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # of command lines
LOCK = threading.Lock()

torch.set_num_threads(1)  # two threads on shared cores are slower, and sums then depend on the load


def build_tiny_idefics3(folder):
    """A family with plain 1-D positions, pixel_values of (samples, images, 3, H, W) and a pixel_attention_mask."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    specials = ["<pad>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
                *(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4))]
    tokenizer = data.build_tokenizer(data.TINY_CORPUS, specials, eos="<end_of_utterance>", pad="<pad>")
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48,
                  patch_size=8)
    config = Idefics3Config(
        text_config=dict(model_type="llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=512, initializer_range=0.1, bos_token_id=None, pad_token_id=0,
                         eos_token_id=tokenizer.eos_token_id),
        vision_config=vision, scale_factor=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0, tie_word_embeddings=False)
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 48}, max_image_size={"longest_edge": 48},
                                                do_image_splitting=False)
    template = data.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    template = template.replace("<|im_start|>", "").replace("<|im_end|>", "<end_of_utterance>")
    processor = Idefics3Processor(image_processor=image_processor, tokenizer=tokenizer, image_seq_len=9,
                                  chat_template=template)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = Idefics3ForConditionalGeneration(config)
    hf.generation_config.eos_token_id = tokenizer.eos_token_id
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_tiny_llava(folder):
    """1-D positions and (images, 3, H, W) pixels; a BOS that the tokenizer adds, pad == EOS, two EOS ids in
    generation_config, five rows of the head beyond the tokenizer, and `<image>` as the model's own placeholder."""
    from tokenizers.processors import TemplateProcessing
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    specials = ["<s>", "</s>", "<image>", "<|end|>"]
    tokenizer = data.build_tokenizer(data.TINY_CORPUS, specials, eos="</s>", pad="</s>")
    tokenizer.bos_token = "<s>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=2, image_size=48, patch_size=16, projection_dim=32)
    config = LlavaConfig(
        text_config=dict(model_type="llama", vocab_size=len(tokenizer) + 5, hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=512, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
                         pad_token_id=1),
        vision_config=vision, image_token_id=2, image_token_index=2, vision_feature_select_strategy="default",
        vision_feature_layer=-1, tie_word_embeddings=False)
    template = """{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}\
{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:\
{% else %}{{ m['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"""
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        tokenizer=tokenizer, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template, image_token="<image>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = LlavaForConditionalGeneration(config)
    hf.generation_config.eos_token_id = [1, 3]
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_tiny(folder, hf_class, config, processor, eos: int):
    """A random model of that class, and its processor, as save_pretrained writes them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = hf_class(config)
        for p in hf.parameters():
            if p.dim() == 2 and not p.any():  # Gemma 3's projector: with zeros no picture would matter
                torch.nn.init.normal_(p, std=0.1)
    hf.generation_config.eos_token_id = eos
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)


def text_config(tokenizer, **more):
    """Heads of 16: FlexAttention on CUDA refuses smaller ones."""
    return dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.1, bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id) | more


def tokenizer_with(image: str, **named):
    """A tokenizer whose `named` special tokens are its attributes, and a chat template that writes `image`."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = data.build_tokenizer(data.TINY_CORPUS, specials, eos="<|im_end|>", pad="<|endoftext|>")
    if named:
        tokenizer._set_model_specific_special_tokens(named)
    return tokenizer, data.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", image)


def build_tiny_qwen(folder, family: str):
    """Qwen2-VL, Qwen3-VL and its mixture of experts: M-RoPE positions, in three layouts, and (patches, D) pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    named = dict(vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>", image_token="<|image_pad|>",
                 video_token="<|video_pad|>")
    tokenizer, template = tokenizer_with("<|vision_start|><|image_pad|><|vision_end|>", **named)
    text = text_config(tokenizer, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    vision = dict(depth=2, num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2, initializer_range=0.1)
    if family == "Qwen2VL":
        del text["head_dim"]  # which it works out
        text |= dict(hidden_size=64)
        vision |= dict(embed_dim=32, hidden_size=64, mlp_ratio=2)
    else:
        text["rope_parameters"] |= dict(mrope_section=[4, 2, 2], mrope_interleaved=True)
        vision |= dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=36,
                       deepstack_visual_indexes=[0])
    if family == "Qwen3VLMoe":
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=family == "Qwen2VL",
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()})
    processor_class = getattr(transformers, "Qwen2VLProcessor" if family == "Qwen2VL" else "Qwen3VLProcessor")
    processor = model.without_video(processor_class)(
        image_processor=Qwen2VLImageProcessorPil(patch_size=8, merge_size=2,
                                                 size={"shortest_edge": 256, "longest_edge": 48 * 48}),
        tokenizer=tokenizer, chat_template=template)
    save_tiny(folder, getattr(transformers, f"{family}ForConditionalGeneration"), config, processor, tokenizer.eos_token_id)


def build_tiny_llava_next(folder):
    """Tiles: as many as the picture's shape asks for, cut and padded again by image_sizes; tokens that end a line."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer, template = tokenizer_with("<image>", image_token="<image>")
    pinpoints = [[48, 48], [48, 96], [96, 48]]
    config = transformers.LlavaNextConfig(
        text_config=dict(model_type="llama", **text_config(tokenizer)), image_token_id=tokenizer.image_token_id,
        image_token_index=tokenizer.image_token_id, tie_word_embeddings=False,
        vision_config=dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, image_size=48, patch_size=16, projection_dim=32),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_grid_pinpoints=pinpoints)
    processor = transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48},
                                   image_grid_pinpoints=pinpoints),
        tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template)
    save_tiny(folder, transformers.LlavaNextForConditionalGeneration, config, processor, tokenizer.eos_token_id)


def build_tiny_llava_onevision(folder):
    """LLaVA-NeXT's tiles, with batch_num_images: a picture that is not alone in its row is not cut into tiles."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tokenizer, template = tokenizer_with("<image>", image_token="<image>", video_token="<video>")
    pinpoints = [[32, 32], [32, 64], [64, 32]]
    config = transformers.LlavaOnevisionConfig(
        text_config=dict(model_type="qwen2", **text_config(tokenizer)), tie_word_embeddings=False,
        vision_config=dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, image_size=32, patch_size=16, vision_use_head=False),
        image_token_id=tokenizer.image_token_id, image_token_index=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id, video_token_index=tokenizer.video_token_id,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=pinpoints)
    processor = model.without_video(transformers.LlavaOnevisionProcessor)(
        image_processor=LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer, num_image_tokens=4, vision_feature_select_strategy="full", chat_template=template)
    save_tiny(folder, transformers.LlavaOnevisionForConditionalGeneration, config, processor, tokenizer.eos_token_id)


def build_tiny_internvl(folder):
    """Pictures cut into tiles of one size, and a thumbnail: (tiles, 3, H, W), and nothing says whose they are."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer, template = tokenizer_with("<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>",
                                         context_image_token="<IMG_CONTEXT>", video_token="<video>")
    config = transformers.InternVLConfig(
        text_config=dict(model_type="qwen2", **text_config(tokenizer)), image_seq_length=4, downsample_ratio=0.5,
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                           image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=tokenizer.context_image_token_id, tie_word_embeddings=False)
    processor = model.without_video(transformers.InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=2), tokenizer=tokenizer,
        image_seq_length=4, chat_template=template)
    save_tiny(folder, transformers.InternVLForConditionalGeneration, config, processor, tokenizer.eos_token_id)


def build_tiny_gemma3(folder):
    """A sliding-window layer (8 tokens, less than an image has: every row outgrows it) before a full one; an image's 16
    tokens see each other both ways."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer, template = tokenizer_with("<start_of_image>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
                                         image_token="<image_soft_token>")
    config = transformers.Gemma3Config(
        text_config=text_config(tokenizer, query_pre_attn_scalar=16, sliding_window=8,
                                layer_types=["sliding_attention", "full_attention"]),
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                           patch_size=8, vision_use_head=False),
        mm_tokens_per_image=16, boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id, eos_token_id=tokenizer.eos_token_id)
    processor = transformers.Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer=tokenizer, image_seq_length=16,
        chat_template=template)
    save_tiny(folder, transformers.Gemma3ForConditionalGeneration, config, processor, tokenizer.eos_token_id)


def build_tiny_text(folder, family: str, **more):
    """A text-only model. Its template wants strings as content, as Llama's and Qwen's do."""
    tokenizer, _ = tokenizer_with("")
    tokenizer.chat_template = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
    text = text_config(tokenizer, **more)
    if family == "Falcon":
        del text["head_dim"]  # which it works out
    config = getattr(transformers, f"{family}Config")(**text, tie_word_embeddings=False)
    save_tiny(folder, getattr(transformers, f"{family}ForCausalLM"), config, tokenizer, tokenizer.eos_token_id)


BUILDERS = {
    "qwen2_5_vl": lambda folder: data.build_tiny_vlm(folder), "idefics3": build_tiny_idefics3, "llava": build_tiny_llava,
    "qwen2_vl": lambda folder: build_tiny_qwen(folder, "Qwen2VL"),
    "qwen3_vl": lambda folder: build_tiny_qwen(folder, "Qwen3VL"),
    "qwen3_vl_moe": lambda folder: build_tiny_qwen(folder, "Qwen3VLMoe"), "llava_next": build_tiny_llava_next,
    "llava_onevision": build_tiny_llava_onevision, "internvl": build_tiny_internvl, "gemma3": build_tiny_gemma3,
    "qwen3": lambda folder: build_tiny_text(folder, "Qwen3"), "llama": lambda folder: build_tiny_text(folder, "Llama"),
    # Its first layer is full, its second slides, over 8 tokens.
    "qwen2": lambda folder: build_tiny_text(folder, "Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
}
FAMILIES = list(BUILDERS)
TEXT_ONLY = ["qwen3", "llama", "qwen2"]
VISION = [family for family in FAMILIES if family not in TEXT_ONLY]


class Folders(dict):
    def __init__(self, root):
        super().__init__()
        self.root = root

    def __missing__(self, family):
        BUILDERS[family](self.root / family)
        self[family] = self.root / family
        return self[family]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{family: model folder}, built when asked for"""
    return Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def loaded(folders):
    """family -> (policy, processor); shared, so a test leaves weights and gradients as it found them."""
    cache = {}

    def get(family):
        if family == "idefics3" and getattr(transformers.Idefics3ImageProcessorPil, "is_dummy", False):
            pytest.skip("this transformers (5.17) loads Idefics3's Pillow processor only where torchvision is")
        if family not in cache:
            cache[family] = model.load_policy(str(folders[family]))
        cache[family][0].zero_grad()
        cache[family][0].kept.clear()  # what a sampler that was made to believe in a GPU has kept
        return cache[family]

    return get


@pytest.fixture(autouse=True)
def signals():
    """A script run in this process takes SIGTERM and SIGINT for itself; the next test's forked child must not inherit it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class InProcess(rollout.RewardRunner):
    """Rewards in this process, where its faults are not the matter."""

    def _start(self):
        self.functions = [process.load_function(path) for path in self.paths]
        self.takes = [process.parameters(function) for function in self.functions]

    def wait_until_ready(self):
        pass

    def _call(self, index, columns, rows, *_):
        _, columns, settings = self.question(index, columns)
        result = process.plain_rewards(self.functions[index](**columns, **settings))
        return runner.checked_rewards(result, columns, rows)

    def close(self):
        pass


def preference_losses(loss_types, chosen, chosen_mask, rejected, rejected_mask, ref_chosen=None, ref_rejected=None,
                      guide_chosen=None, guide_rejected=None, *, nll_normalization="sequence", ld_alpha=None,
                      f_divergence_type=None, f_alpha_divergence_coef=0.5, **options):
    """A mix from two sides' tensors, put together as train_dpo.score_groups does; f-divergences for losses that have one."""
    sides = [dict(logps=chosen, mask=chosen_mask), dict(logps=rejected, mask=rejected_mask)]
    for name, both in ("ref_logps", (ref_chosen, ref_rejected)), ("guide_logps", (guide_chosen, guide_rejected)):
        if both[0] is not None:
            sides = [side | {name: x} for side, x in zip(sides, both)]
    pair, plain = losses.pair_of(*sides), dict(bco_shift=0.0, eta=0.9, label_smoothing=0.0, simpo_gamma=0.5)
    options = plain | options
    if ld_alpha is not None:
        pair |= METHODS["ld_dpo"].log_ratios(pair, Namespace(ld_alpha=ld_alpha))
    scored = pair if f_divergence_type is None else pair | METHODS["f_dpo"].log_ratios(pair, Namespace(
        f_divergence_type=f_divergence_type, f_alpha_divergence_coef=f_alpha_divergence_coef))
    able = losses.which(losses.PAIR_LOSSES, of_ratios=True)
    terms, (_, metrics) = {}, losses.preference_losses([], pair, **options)
    for name in loss_types:
        terms |= ({"sft": losses.nll_loss(chosen, chosen_mask, normalization=nll_normalization)} if name == "sft" else
                  losses.preference_losses([name], scored if name in able else pair, **options)[0])
    metrics["nll"] = -losses.masked_sum(chosen, chosen_mask).detach().sum(), chosen_mask.sum()
    if "lcpo" in loss_types:
        metrics |= METHODS["lcpo"].metrics(pair, **options)
    return terms, metrics


def close_to_scale(actual, expected, share=4e-6, at_least=0.0, name="values"):
    """|actual - expected| <= share * the largest |expected| of the tensor.

    For one value computed in two ways (other shapes, batches or orders), which differ by rounding. A rounding is a share of
    the terms of a sum, and where they cancel not of the sum: an element near 0 is as inexact as the largest. How many there
    are is the CPU's affair: two passes that are equal to the bit with AVX2 differ with AVX-512, by 6e-6 of 15. So a limit that
    says nothing of the scale is of one CPU. Two passes that are one computation are torch.equal instead.

    share: log-probs differ by up to 4.4e-7 of their scale (AVX2, SSE), so 4e-6; hidden states by 9e-7, so 1e-5; gradients,
    whose sums are longer, by 4e-6, so 4e-5. at_least: the scale where `expected` is 0 but for rounding."""
    scale = max(expected.abs().max().item(), at_least)
    assert 0 < scale < float("inf"), f"{name}: no scale"
    torch.testing.assert_close(actual, expected, atol=share * scale, rtol=0, msg=lambda m: f"{name}, scale {scale:.3g}: {m}")


def few(cases, *quick):
    """All of them, marked slow but for these."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def make_row(images: int, seed: int = 0, text: str = "how many shapes are there?", size=None) -> dict:
    """A row with that many pictures, of different sizes."""
    rng = random.Random(seed)
    pictures = [data.draw_shapes(rng, rng.randint(1, 6)).resize(size or rng.choice([(48, 48), (48, 32), (32, 48)]))
                for _ in range(images)]
    return {"prompt": text, "images": pictures, "solution": "3", "_source": f"row {seed}", "_image_root": None}


def make_group(policy, processor, images: int, lengths, seed: int = 0, text: str = "how many shapes are there?"):
    """(Prompt, completions of random allowed ids, the last of each an EOS). Text-only models get no images."""
    images = images if hasattr(processor, "image_processor") else 0
    prompt = data.encode_prompt(policy, processor, make_row(images, seed, text))
    generator = torch.Generator().manual_seed(seed)
    banned = set(policy.never_sampled.tolist()) | set(policy.eos_ids)
    allowed = torch.tensor([i for i in range(policy.hf.get_output_embeddings().weight.shape[0]) if i not in banned])
    completions = []
    for length in lengths:
        ids = allowed[torch.randint(len(allowed), (length,), generator=generator)]
        ids[-1] = policy.eos_ids[0]
        completions.append(ids)
    return prompt, completions


def after_log(monkeypatch, call):
    """call(metrics) after each line of metrics.jsonl. -> the undo"""
    original = model.Run.log

    def log(run, metrics, shown):
        original(run, metrics, shown)
        call(metrics)

    monkeypatch.setattr(model.Run, "log", log)
    return lambda: monkeypatch.setattr(model.Run, "log", original)


@functools.cache
def start_server():
    folder = tempfile.mkdtemp()
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "warm.py", folder], env=ENVIRONMENT, start_new_session=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n"
    return folder, server  # it ends when this process does


def python():
    """A Python that has torch and transformers imported when it starts (warm.py); one server for each worker."""
    with LOCK:  # some tests start their command lines in threads
        return f"{start_server()[0]}/python"


def run(*command, cwd, ok=True, env=None, timeout=600):
    """A command from `cwd` with the project's scripts by absolute path; returns its output (stdout + stderr)."""
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=ENVIRONMENT | (env or {}), text=True,
                            timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (result.returncode == 0) == ok, f"exit code {result.returncode}:\n{result.stdout}"
    return result.stdout


def script(name, *flags, ranks=1, **kwargs):
    launch = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return run(python(), *launch, ROOT / name, *flags, **kwargs)
