"""Train all emoji models on one GPU in ten minutes, on every group and style.

    python -m benchmarks.gpu.train_emoji prepare                      # where the data are: writes out/emoji_gpu (22 MB)
    python -m benchmarks.gpu.train_emoji train --out "$OUT"           # on the GPU, which needs out/emoji_gpu alone
    python -m benchmarks.gpu.train_emoji join --source DIR            # back here: puts the parts together again

Training is that of `benchmarks.models.emoji`, with larger batches in bfloat16. What comes back is in parts below 16 MB.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.models.emoji import data
from benchmarks.models.emoji.prompts import PromptEncoder
from benchmarks.models.emoji.train import known_phrases
from benchmarks.models.emoji.video import known_prompts

PREPARED = Path("out/emoji_gpu")
MODELS = Path(data.__file__).parent
PART = 15 << 20  # bytes
SHARE = {"autoencoder": 0.2, "mmdit": 0.35, "unet": 0.25, "video": 0.2}  # of the minutes


def prepare() -> None:
    """Pictures as uint8 and MiniLM's embeddings of all captions: the GPU machine needs neither npm nor MiniLM."""
    torch.set_num_threads(1)  # short sentences one by one: more threads only wait for each other
    PREPARED.mkdir(parents=True, exist_ok=True)
    data.load()
    shutil.copy(data.CACHE / "emoji.npz", PREPARED)
    PromptEncoder.of(*known_phrases(everything=True)).half().save_pretrained(PREPARED / "encoder")
    known_prompts(everything=True).half().save_pretrained(PREPARED / "video_encoder")
    size = sum(file.stat().st_size for file in PREPARED.rglob("*") if file.is_file())
    print(f"{PREPARED}: {size / 2**20:.0f} MiB")


def train(out: Path, minutes: float, device: str, batch: int) -> None:
    """One process for each model, so that the memory of one is free for the next."""
    data.CACHE.mkdir(parents=True, exist_ok=True)
    shutil.copy(PREPARED / "emoji.npz", data.CACHE)
    work = Path("out/emoji_gpu_work")
    common = ["--device", device, *(["--bf16"] if device == "cuda" else [])]
    for name, share in SHARE.items():
        module = name if name in ("autoencoder", "video") else "train"
        folder = work / ("vae" if name == "autoencoder" else name)
        encoder = PREPARED / ("video_encoder" if name == "video" else "encoder")
        prepared = ["--vae", str(work / "vae"), "--encoder", str(encoder), "--everything"]
        own = [] if name == "autoencoder" else [*([name] if module == "train" else []), *prepared]
        own += ["--batch", str(batch // 2 if name == "video" else batch)]  # a clip has eight pictures
        files = ["--folder", str(folder), "--checkpoint", str(work / f"{name}.ckpt"), "--minutes", str(share * minutes)]
        command = [sys.executable, "-m", f"benchmarks.models.emoji.{module}", *own, *common, *files]
        subprocess.run(command, check=True)
        if name != "autoencoder":
            split(folder, out / name)


def split(folder: Path, out: Path) -> None:
    """One archive of the folder, cut into parts."""
    archive = Path(shutil.make_archive(str(folder), "gztar", folder))
    out.mkdir(parents=True, exist_ok=True)
    content = archive.read_bytes()
    for number, start in enumerate(range(0, len(content), PART)):
        (out / f"part{number}").write_bytes(content[start : start + PART])


def join(source: Path) -> None:
    """Unpack what `split` wrote, over the shipped folders."""
    for parts in sorted(folder for folder in source.iterdir() if (folder / "part0").exists()):
        archive = Path("out") / f"{parts.name}.tar.gz"
        archive.write_bytes(b"".join((parts / f"part{i}").read_bytes() for i in range(len(list(parts.iterdir())))))
        shutil.unpack_archive(archive, MODELS / parts.name)
        print(f"wrote {MODELS / parts.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "train", "join"))
    parser.add_argument("--out", type=Path, default=Path("out/emoji_gpu_parts"))
    parser.add_argument("--source", type=Path, default=Path("out/emoji_gpu_parts"))
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.stage == "prepare":
        prepare()
    elif arguments.stage == "train":
        train(arguments.out, arguments.minutes, arguments.device, arguments.batch)
    else:
        join(arguments.source)


if __name__ == "__main__":
    main()
