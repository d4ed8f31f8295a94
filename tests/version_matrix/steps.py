"""Runs inside one environment of the matrix, without this package; says on its last line what became of each step.

    python steps.py {expect | all | elsewhere} MATERIAL FOLDER

`expect` writes what a version answers, `all` runs every step and saves the fine-tuned model to `FOLDER/saved`,
`elsewhere` loads such a folder and compares its answers with those of the version that saved it.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image


warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
BUDGETS = (1, 9, "auto")
AUTO = getattr(transformers, "AutoModelForImageTextToText", None)
if transformers.__version__.startswith("4."):
    AUTO = transformers.AutoModelForVision2Seq


def load(folder: Path) -> tuple[Any, Any]:
    model = AUTO.from_pretrained(folder, trust_remote_code=True)
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def asked(material: Path) -> list[tuple[Image.Image, list[dict], str]]:
    rows: list[tuple[Image.Image, list[dict], str]] = []
    for row in json.loads((material / "asked.json").read_text()):
        content: list[dict] = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        rows.append((Image.open(material / row["image"]), [{"role": "user", "content": content}], row["answer"]))
    return rows


def answers(model: Any, processor: Any, material: Path) -> dict[str, list]:
    """Token ids and tokens spent, of all pictures in one padded batch, by budget."""
    images, messages, _ = zip(*asked(material), strict=True)
    prompts = [processor.apply_chat_template(message, add_generation_prompt=True) for message in messages]
    inputs = processor(images=list(images), text=prompts, return_tensors="pt", padding=True)
    found = {}
    for budget in BUDGETS:
        with torch.no_grad():
            written = model.generate(**inputs, visual_token_budget=budget, max_new_tokens=4, do_sample=False)
            spent = model(**inputs, visual_token_budget=budget).num_visual_tokens
        found[str(budget)] = [written[:, inputs["input_ids"].shape[1] :].tolist(), spent.tolist()]
    return found


def fine_tune(model: Any, processor: Any, material: Path, folder: Path) -> Any:
    from datasets import Dataset, List
    from datasets import Image as ImageColumn
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = []
    for image, messages, answer in asked(material):
        completion = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        rows.append({"images": [image], "prompt": messages, "completion": completion})
    data = Dataset.from_list(rows).cast_column("images", List(ImageColumn()))
    settings = SFTConfig(
        output_dir=str(folder / "run"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_length=None,
        use_cpu=True,
        seed=0,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*(q_proj|v_proj|gate_proj|down_proj)")
    trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=processor, peft_config=lora)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(loss == loss for loss in losses), losses
    return trainer.model.merge_and_unload().eval()


def main() -> None:
    what, material, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    said: dict[str, object] = {}
    kept: dict[str, Any] = {}

    def step(name: str, run, after: str | None = None) -> None:
        if after and after not in kept:
            said[name] = f"not reached, as {after} failed"
            return
        try:
            kept[name] = run()
            said[name] = "ok"
        except Exception as error:  # the table tells it
            traceback.print_exc()
            said[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]

    def same_answers() -> None:
        expected = json.loads((material / "expected.json").read_text())
        model, processor = kept["load"]
        assert answers(model, processor, material) == expected, "other answers than the version that saved it"

    def asked_by_pipeline() -> None:
        model, processor = kept["load"]
        run = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        image, messages, _ = asked(material)[0]
        content = [{"type": "image", "image": image}, messages[0]["content"][1]]
        said_by = run(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
        ids = json.loads((material / "expected.json").read_text())["auto"][0][0]
        assert said_by[0]["generated_text"].strip() == processor.decode(ids, skip_special_tokens=True).strip(), said_by

    def saved() -> None:
        kept["fine_tune"].save_pretrained(folder / "saved")
        kept["load"][1].save_pretrained(folder / "saved")
        found = answers(kept["fine_tune"], kept["load"][1], material)
        (folder / "saved" / "answers.json").write_text(json.dumps(found))

    def same_answers_elsewhere() -> None:
        assert (folder / "answers.json").exists(), "nothing was saved"
        assert answers(*load(folder), material) == json.loads((folder / "answers.json").read_text()), "other answers"

    if what == "expect":
        (material / "expected.json").write_text(json.dumps(answers(*load(material / "checkpoint"), material)))
    elif what == "elsewhere":
        step("elsewhere", same_answers_elsewhere)
    else:
        folder.mkdir()
        names = ("transformers", "trl", "peft", "tokenizers", "huggingface_hub", "torch")
        said["versions"] = {name: importlib.metadata.version(name) for name in names}
        step("load", lambda: load(material / "checkpoint"))
        step("generate", same_answers, "load")
        step("pipeline", asked_by_pipeline, "load")
        step("fine_tune", lambda: fine_tune(*load(material / "checkpoint"), material, folder))
        step("save", saved, "fine_tune")
    print("STEPS " + json.dumps(said))


main()
