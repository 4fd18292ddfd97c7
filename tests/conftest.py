"""Tiny random models of the real classes, written by save_pretrained and read back by the program's own loader."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import model

torch.set_num_threads(1)  # two threads on shared cores are slower, and sums then depend on the load


def build_tiny_idefics3(folder):
    """A family with plain 1-D positions, pixel_values of (samples, images, 3, H, W) and a pixel_attention_mask."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    specials = ["<pad>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
                *(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4))]
    tokenizer = model.build_tokenizer(model.TINY_CORPUS, specials, eos="<end_of_utterance>", pad="<pad>")
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
    template = model.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
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
    tokenizer = model.build_tokenizer(model.TINY_CORPUS, specials, eos="</s>", pad="</s>")
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


BUILDERS = {"qwen2_5_vl": lambda folder: model.build_tiny_vlm(folder), "idefics3": build_tiny_idefics3,
            "llava": build_tiny_llava}
FAMILIES = list(BUILDERS)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{family: model folder}"""
    made = {}
    for name, build in BUILDERS.items():
        made[name] = tmp_path_factory.mktemp(name)
        build(made[name])
    return made


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
        return cache[family]

    return get


def make_row(images: int, seed: int = 0, text: str = "how many shapes are there?", size=None) -> dict:
    """A row with that many pictures, of different sizes."""
    rng = random.Random(seed)
    pictures = [data.draw_shapes(rng, rng.randint(1, 6)).resize(size or rng.choice([(48, 48), (48, 32), (32, 48)]))
                for _ in range(images)]
    return {"prompt": text, "images": pictures, "solution": "3", "_source": f"row {seed}", "_image_root": None}


def make_group(policy, processor, images: int, lengths, seed: int = 0, text: str = "how many shapes are there?"):
    """(Prompt, completions of random allowed ids, the last of each an EOS)."""
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


def run(*command, cwd, ok=True, env=None, timeout=600):
    """A command from `cwd` with the project's scripts by absolute path; returns its output (stdout + stderr)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, text=True, timeout=timeout,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (result.returncode == 0) == ok, f"exit code {result.returncode}:\n{result.stdout}"
    return result.stdout


def script(name, *flags, ranks=1, **kwargs):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    return run(*launch, ROOT / name, *flags, **kwargs)
