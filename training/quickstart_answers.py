"""Answer held-out questions with saved models, in a process of its own.

Asked to trust remote code, `quickstart.py` runs this file by itself, with Python's isolated mode and a library folder
in which the package does not exist: what it prints was computed by the code files saved beside the weights.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path


BATCH_SIZE = 64  # prompts
RUNS = {  # name: which model, at which budget
    "before_largest": ("before", "largest"),
    "before_auto": ("before", "auto"),
    "smallest": ("after", "smallest"),
    "auto": ("after", "auto"),
    "largest": ("after", "largest"),
}


def main(job_file: str, libraries: str | None = None) -> None:
    """Run the job that `quickstart.py` wrote.

    Args:
        job_file: JSON with `models` (folders, `before` and `after` fine-tuning), `images` (`path`, `kind`,
            `questions`), `own_images` (paths), `trust_remote_code` (what the user said) and `output` (file to write).
        libraries: Folder to import torch, transformers and the rest from, where the package is to be absent.
    """
    if libraries is not None:
        sys.path.append(libraries)
        if importlib.util.find_spec("adaptive_llava") is not None:
            raise RuntimeError("`adaptive_llava` can be imported here, so this run would prove nothing.")
        print("  import adaptive_llava -> ModuleNotFoundError, as intended", flush=True)
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = str(Path(job_file).parent / "remote_code")

    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    remote = {"trust_remote_code": job["trust_remote_code"]}
    processor = AutoProcessor.from_pretrained(job["models"]["after"], **remote)
    models = {
        name: AutoModelForImageTextToText.from_pretrained(folder, **remote).eval()
        for name, folder in job["models"].items()
    }
    model = models["after"]
    code = Path(sys.modules[type(model).__module__].__file__).name
    print(f"  {type(model).__name__} from {code} of {'this package' if libraries is None else 'the saved folder'}")

    counts = list(model.config.visual_token_counts)
    budgets = {"smallest": counts[0], "auto": "auto", "largest": counts[-1]}
    answers: dict[str, list[dict]] = {}
    for name, (tuning, budget) in RUNS.items():
        answers[name] = answer(models[tuning], processor, job["images"], budgets[budget])
        print(f"  asked {len(answers[name])} questions {tuning} fine-tuning, budget {budgets[budget]}", flush=True)
    result = {
        "package_importable": libraries is None,
        "model_class": f"{type(model).__module__}.{type(model).__name__}",
        "token_counts": counts,
        "answers": answers,
        "own_images": route(model, processor, job["own_images"]),
        "peak_memory_mib": peak_memory_mib(),
    }
    Path(job["output"]).write_text(json.dumps(result), encoding="utf-8")


def answer(model, processor, images: list[dict], budget: int | str) -> list[dict]:
    """Ask every question of every image; each prompt shows one image at its own number of tokens."""
    asked = [
        {"image": image["path"], "kind": image["kind"], "question": question, "expected": expected}
        for image in images
        for question, expected in image["questions"]
    ]
    for start in range(0, len(asked), BATCH_SIZE):
        batch = asked[start : start + BATCH_SIZE]
        conversations = [
            [{"role": "user", "content": [{"type": "image", "path": row["image"]}, _text(row["question"])]}]
            for row in batch
        ]
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        output = model.generate(
            **inputs, visual_token_budget=budget, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new_ids, skip_special_tokens=True)
        for row, text, tokens in zip(batch, texts, output.num_visual_tokens.tolist(), strict=True):
            row.update(answer=text.strip(), right=text.strip() == row["expected"], tokens=tokens)
    return asked


def _text(question: str) -> dict:
    return {"type": "text", "text": question}


def route(model, processor, paths: list[str]) -> list[dict]:
    """How many tokens the router would spend on each image."""
    routed = []
    for path in paths:
        encoded = model.encode_images(processor(images=[path], return_tensors="pt")["pixel_values"])
        routed.append({"image": path, "tokens": encoded.lengths[0]})
    return routed


def peak_memory_mib() -> int | None:
    """Most memory this process ever held, in MiB; `None` where the system does not say."""
    status = Path("/proc/self/status")  # getrusage would count what the parent held before this process began
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    main(*sys.argv[1:])
