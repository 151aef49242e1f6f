"""Render the embedded pictures: five vendors' drawings of the same things, 64 px, two webdataset shards.

Needs `resvg_py` and the five npm packages, unpacked side by side:

    for p in noto noto-v1 fluent-emoji-flat emojione fxemoji; do
        mkdir -p packs/$p && tar xzf $(npm pack -s @iconify-json/$p) -C packs/$p
    done
    python benchmarks/embedded/render.py packs

Which things the CLIP was trained on (`emoji.tar`): every name that all five packs have, less those that are
abstract marks (squares, moons, zodiac signs, ...), less those that two vendors drew almost alike (a style
could not be told there). Of the latter, ten that look like none of the rest, and whose names share no word
with theirs, are the things that it has never seen (`unseen.tar`): of these, nobody asks the style.
"""

import argparse
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from slug_lightning.embedded import SHARD, UNSEEN

STYLES = {
    "noto": "noto",
    "blob": "noto-v1",
    "fluent": "fluent-emoji-flat",
    "emojione": "emojione",
    "firefox": "fxemoji",
}
SIZE = 64
ABSTRACT = re.compile(
    "square|diamond|moon|loop|dash|mark|button|arrow|bubble|symbol|alternation|emblem|zzz|dizzy|sparkle|collision|fog"
    "|aquarius|aries|cancer|capricorn|gemini|leo|libra|ophiuchus|pisces|taurus|virgo|scorpio|sagittarius|claim|customs"
    "|passport|luggage|closet|restroom|no-|-off|vibration|mode|currency|heavy|label|hole|memo|ledger|oncoming|incoming"
    "|inbox|curl|page|card|folder|orange-book|green-book|blue-book|beating|growing|revolving|heart-dec|small|name-badge"
    "|cityscape|night|post-office|railway|light-rail|monorail|tram|station|metro|bus-stop|minibus|e-mail|wedding"
    "|department|convenience|office|love-hotel|horse-face|cow-face|monkey-face|poodle|water-buffalo|carp-streamer"
    "|pine-decoration|tanabata|tickets|clinking|soft-ice|shaved|rolled-up|round-pushpin|linked|sunrise-over"
)
ALIKE = 0.08
"""Mean absolute difference of two drawings on white, in [0, 1], under which they count as almost alike."""
NEVER_SEEN = ("anchor", "banana", "bell", "candle", "hammer", "headphone", "jeans", "pineapple", "rooster", "skull")
"""Names of the things in `unseen.tar`."""


def drawing(pack: dict, name: str) -> Image.Image:
    """Render one icon of an Iconify pack, following its aliases, to an RGBA picture."""
    while name in pack.get("aliases", {}):
        name = pack["aliases"][name]["parent"]
    icon = pack["icons"][name]
    box = [icon.get(key, pack.get(key, default)) for key, default in (("left", 0), ("top", 0))]
    box += [icon.get(key, pack.get(key, 16)) for key in ("width", "height")]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def on_white(picture: Image.Image) -> np.ndarray:
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return np.asarray(ground.convert("RGB"), dtype=float) / 255


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))


def alike(drawings: Iterable[Image.Image]) -> bool:
    """Say whether any two of the drawings are almost alike."""
    return min(np.abs(a - b).mean() for a, b in itertools.combinations(map(on_white, drawings), 2)) < ALIKE


def write(path: Path, drawn: dict[str, dict[str, Image.Image]]) -> None:
    """Write a shard from drawings by style, by the name of the thing."""
    with tarfile.open(path, "w") as shard:
        for name, (style, picture) in ((name, one) for name, by_style in drawn.items() for one in by_style.items()):
            png = io.BytesIO()
            picture.save(png, "PNG", optimize=True)
            thing = name.replace("-", " ")
            add(shard, f"{name}_{style}.png", png.getvalue())
            add(shard, f"{name}_{style}.txt", f"{thing} in {style} style".encode())
            add(shard, f"{name}_{style}.json", json.dumps({"thing": thing, "style": style}).encode())
    print(f"{len(drawn)} things x {len(STYLES)} styles -> {path} ({path.stat().st_size / 2**20:.1f} MiB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", type=Path, help="folder with one unpacked npm package a sub-folder")
    packs = parser.parse_args().packs
    icons = {s: json.loads((packs / p / "package" / "icons.json").read_text()) for s, p in STYLES.items()}
    # fxemoji writes names without hyphens, so names are compared without them; noto's spelling is kept.
    spelled = {
        style: {name.replace("-", ""): name for name in [*pack["icons"], *pack.get("aliases", {})]}
        for style, pack in icons.items()
    }
    names = [n for n in sorted(icons["noto"]["icons"]) if not ABSTRACT.search(n)]
    names = [n for n in names if all(n.replace("-", "") in known for known in spelled.values())]
    drawn = {name: {s: drawing(icons[s], spelled[s][name.replace("-", "")]) for s in STYLES} for name in names}
    seen = {name: by_style for name, by_style in drawn.items() if not alike(by_style.values())}
    write(SHARD, seen)
    known = {word for name in seen for word in name.split("-")}
    assert not any(known & set(name.split("-")) for name in NEVER_SEEN), "the CLIP knows a word of these names"
    write(UNSEEN, {name: drawn[name] for name in NEVER_SEEN})


if __name__ == "__main__":
    main()
