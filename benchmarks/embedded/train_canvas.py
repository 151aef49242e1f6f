"""Train the miniature UnlearnCanvas that ships with the package: a text-to-image pipeline and its two judges.

    python benchmarks/embedded/train_canvas.py classifiers   # a few minutes
    python benchmarks/embedded/train_canvas.py autoencoder   # then
    python benchmarks/embedded/train_canvas.py generator     # the most of it; writes the pipeline
    python benchmarks/embedded/train_canvas.py evaluate      # only print the accuracies of what is shipped

Each part is seeded, logged, and goes on from its checkpoint. The pipeline is a StableDiffusionPipeline of diffusers: an
autoencoder from 32 x 32 pixels to 8 x 8 latents, the text tower of the embedded CLIP as it is, and a UNet that reads it. The
classifiers are trained apart, with their own seed, on renderings that vary more; what they are judged on was rendered for that
alone. Neither part is told what will be forgotten.
"""

import argparse
import math
import time
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn.functional import cross_entropy, interpolate, l1_loss, mse_loss
from train import TEMPLATES
from transformers import AutoTokenizer, CLIPTextModel, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from slug_lightning.clip.models import to_hugging_face
from slug_lightning.datamodules.demo.canvas import AMOUNT, canvas_drawings
from slug_lightning.datamodules.demo.emoji import caption_of, render
from slug_lightning.diffusion.judges import make_judges
from slug_lightning.diffusion.pipelines import draw, load_pipeline
from slug_lightning.embedded import CANVAS, CLIP
from slug_lightning.embedded.drawings import Drawings

SEED, SIZE = 0, 32
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 1500, 100
AUTOENCODER_STEPS, AUTOENCODER_BATCH = 900, 64
GENERATOR_STEPS, GENERATOR_BATCH = 2500, 64
DECAY = 4000
"""Steps after which the generator's learning rate would be zero: it is good enough before."""
MORE, UNTIL = 0.4, 1800
"""How far renderings vary for autoencoder and classifiers, and for the generator until this step; after it, as `AMOUNT` says."""
RENDERINGS = 64
"""Of each drawing, encoded once for the generator."""
EMPTY, HALF = 0.1, 0.2
"""How often the generator's prompt says nothing (for guidance), or names the thing or the style alone."""


def canvas_render(pictures: torch.Tensor, generator: torch.Generator, amount: float = AMOUNT) -> torch.Tensor:
    """Render drawings, uint8 RGBA `[B, 4, 64, 64]`, as the model knows them: RGB `[B, 3, 32, 32]` in [-1, 1]."""
    return interpolate(render(pictures, generator, amount), size=(SIZE, SIZE), mode="area").clamp(-1, 1)


def rate_at(step: int, steps: int) -> float:
    """Factor of the learning rate: warm-up over 100 steps, then a cosine to zero."""
    return min(step / 100, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Training:
    """A seeded loop that goes on where its checkpoint ends."""

    def __init__(
        self, model: torch.nn.Module, steps: int, rate: float, checkpoint: Path, decay: int = 0, ema: bool = False
    ) -> None:
        self.model, self.steps, self.checkpoint, self.step = model, steps, checkpoint, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_at(step + 1, decay or steps))
        self.generator = torch.Generator().manual_seed(SEED)
        self.ema = EMAModel(model.parameters(), decay=0.998) if ema else None
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.generator.set_state(state["generator"])
            self.step = state["step"]

    def _parts(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return parts | ({"ema": self.ema} if self.ema else {})

    def run(self, loss_of) -> None:
        """Descend `loss_of(generator)`."""
        start, total = time.time(), 0.0
        while self.step < self.steps:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(self.generator)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            if self.ema:
                self.ema.step(self.model.parameters())
            self.step, total = self.step + 1, total + loss.item()
            if self.step % 100 == 0:
                print(f"step {self.step}/{self.steps}  loss {total / 100:.4f}  {time.time() - start:.0f} s", flush=True)
                state = {name: part.state_dict() for name, part in self._parts().items()}
                torch.save(state | {"generator": self.generator.get_state(), "step": self.step}, self.checkpoint)
                total = 0.0
        if self.ema:
            self.ema.copy_to(self.model.parameters())


def some(drawings: Drawings, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(len(drawings.pictures), (count,), generator=generator)


# ---- the judges


def train_classifiers(drawings: Drawings, checkpoints: Path) -> None:
    for kind, labels, names in (
        ("style", drawings.styles, drawings.style_names),
        ("thing", drawings.things, drawings.thing_names),
    ):
        print(f"{kind} classifier", flush=True)
        torch.manual_seed(SEED + 1)
        config = ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic", num_labels=len(names),
            id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        )  # fmt: skip
        model = ResNetForImageClassification(config).train()
        training = Training(model, CLASSIFIER_STEPS, 2e-3, checkpoints / f"{kind}.ckpt")

        def loss_of(generator: torch.Generator, model=model, labels=labels) -> torch.Tensor:
            rows = some(drawings, CLASSIFIER_BATCH, generator)
            half = CLASSIFIER_BATCH // 2
            wide = interpolate(render(drawings.pictures[rows[:half]], generator), size=(SIZE, SIZE), mode="area")
            pictures = torch.cat([wide, canvas_render(drawings.pictures[rows[half:]], generator, MORE)])
            # Generated pictures are softer than drawn ones, so the judges see such as well.
            size = int(torch.randint(SIZE // 2, SIZE + 1, (1,), generator=generator))
            soft = interpolate(interpolate(pictures, size=(size, size), mode="area"), size=(SIZE, SIZE), mode="bilinear")
            return cross_entropy(model(soft).logits.float(), labels[rows], label_smoothing=0.05)

        training.run(loss_of)
        model.eval().half().save_pretrained(CANVAS / kind)
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        ViTImageProcessor(size={"height": SIZE, "width": SIZE}, **half).save_pretrained(CANVAS / kind)


# ---- the pipeline


def make_autoencoder() -> AutoencoderKL:
    torch.manual_seed(SEED)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[24, 48, 96],
        layers_per_block=1, latent_channels=8, norm_num_groups=8, sample_size=SIZE, mid_block_add_attention=False,
    )  # fmt: skip


def train_autoencoder(drawings: Drawings, checkpoints: Path) -> AutoencoderKL:
    print("autoencoder", flush=True)
    model = make_autoencoder()

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        pictures = canvas_render(drawings.pictures[some(drawings, AUTOENCODER_BATCH, generator)], generator, MORE)
        posterior = model.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        again = model.decode(posterior.mean + posterior.std * noise).sample.float()
        return l1_loss(again, pictures) + mse_loss(again, pictures) + 1e-5 * posterior.kl().mean()

    Training(model, AUTOENCODER_STEPS, 2e-3, checkpoints / "autoencoder.ckpt").run(loss_of)
    return model.eval()


def make_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    torch.manual_seed(SEED)
    twin = to_hugging_face(open_clip.create_model(f"local-dir:{CLIP}"))
    text_encoder = CLIPTextModel(twin.config.text_config)
    text_encoder.load_state_dict(twin.text_model.state_dict())
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=[96, 128],
        down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
        cross_attention_dim=text_encoder.config.hidden_size, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    noise = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False, "steps_offset": 1}
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=AutoTokenizer.from_pretrained(CLIP), unet=unet,
        scheduler=DDIMScheduler(**noise, timestep_spacing="trailing"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def caption(drawings: Drawings, row: int, generator: torch.Generator) -> str:
    chance = torch.rand(1, generator=generator).item()
    template = TEMPLATES[int(torch.randint(len(TEMPLATES), (1,), generator=generator))]
    thing = drawings.thing_names[int(drawings.things[row])]
    style = f"{drawings.style_names[int(drawings.styles[row])]} style"
    if chance < EMPTY:
        return ""
    if chance < EMPTY + HALF:
        return template.format(thing if chance < EMPTY + HALF / 2 else style)
    return template.format(f"{thing} in {style}")


def train_generator(drawings: Drawings, checkpoints: Path) -> None:
    print("generator", flush=True)
    vae = train_autoencoder(drawings, checkpoints)
    pipeline = make_pipeline(vae)
    pipeline.set_progress_bar_config(disable=True)
    every = torch.arange(len(drawings.pictures)).repeat(RENDERINGS)
    renderings = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        varied, latents = (
            torch.cat(
                [
                    vae.encode(canvas_render(drawings.pictures[part], renderings, amount)).latent_dist.mean
                    for part in every.split(500)
                ]
            )
            for amount in (MORE, AMOUNT)
        )
    vae.register_to_config(scaling_factor=round(1 / varied.std().item(), 4))
    print(f"{len(latents)} latents of each kind, scaled by {vae.config.scaling_factor}", flush=True)
    noise = DDPMScheduler.from_config(pipeline.scheduler.config)
    known: dict[str, torch.Tensor] = {}

    def encoded(text: str) -> torch.Tensor:
        if text not in known:
            with torch.no_grad():
                known[text] = pipeline.encode_prompt(text, "cpu", 1, False)[0]
        return known[text]

    training = Training(pipeline.unet.train(), GENERATOR_STEPS, 1e-3, checkpoints / "generator.ckpt", DECAY, ema=True)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        rows = some(drawings, GENERATOR_BATCH, generator)
        rows = rows + len(drawings.pictures) * torch.randint(RENDERINGS, (GENERATOR_BATCH,), generator=generator)
        clean = (varied if training.step < UNTIL else latents)[rows] * vae.config.scaling_factor
        text = torch.cat([encoded(caption(drawings, int(every[row]), generator)) for row in rows])
        times = torch.randint(1000, (GENERATOR_BATCH,), generator=generator)
        added = torch.randn(clean.shape, generator=generator)
        guess = pipeline.unet(noise.add_noise(clean, added, times), times, text).sample.float()
        return mse_loss(guess, noise.get_velocity(clean, added, times))

    training.run(loss_of)
    pipeline.unet.eval()
    pipeline.to(torch.float16).save_pretrained(CANVAS / "pipeline")
    # The tokenizer's class has another name since transformers 5, which knows the old one as well.
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        path = CANVAS / "pipeline" / name
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


# ---- the bar


@torch.no_grad()
def evaluate(drawings: Drawings) -> None:
    """Print how often the judges are right: on renderings made for this alone, and on what the pipeline draws."""
    judges = make_judges({kind: str(CANVAS / kind) for kind in ("style", "thing")}, [])
    labels = {"style": drawings.styles, "thing": drawings.things}
    generator = torch.Generator().manual_seed(10_000)
    pictures = torch.cat([canvas_render(drawings.pictures, generator) for _ in range(10)])
    for kind, judge in judges.items():
        right = judge(pictures).argmax(1) == labels[kind].repeat(10)
        print(f"{kind}: {right.float().mean():.4f} of {len(right)} new renderings", flush=True)
    if not (CANVAS / "pipeline").exists():
        return
    pipeline = load_pipeline(CANVAS / "pipeline")
    prompts = [caption_of(drawings, row) for row in range(len(drawings.pictures))]
    for steps, guidance in ((25, 2.0), (25, 1.0), (10, 2.0), (10, 1.0), (6, 2.0)):
        drawn = [
            draw(pipeline, prompts, range(first, first + len(prompts)), steps=steps, guidance=guidance, size=SIZE)
            for first in range(20_000, 20_000 + 3 * len(prompts), len(prompts))
        ]
        found = {
            kind: (judge(torch.cat(drawn)).argmax(1) == labels[kind].repeat(3)).float().mean().item()
            for kind, judge in judges.items()
        }
        print(f"samples, {steps} steps, guidance {guidance}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("classifiers", "autoencoder", "generator", "evaluate"))
    checkpoints = Path("runs/canvas")
    parser.add_argument("--checkpoints", type=Path, default=checkpoints, help="where to go on from (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    drawings, threads = canvas_drawings(), torch.get_num_threads()
    print(f"seed {SEED}, {len(drawings.pictures)} drawings, torch {torch.__version__}, {threads} threads", flush=True)
    if arguments.part == "classifiers":
        train_classifiers(drawings, arguments.checkpoints)
    elif arguments.part == "autoencoder":
        train_autoencoder(drawings, arguments.checkpoints)
    elif arguments.part == "generator":
        train_generator(drawings, arguments.checkpoints)
    if arguments.part in ("classifiers", "generator", "evaluate"):
        evaluate(drawings)


if __name__ == "__main__":
    main()
