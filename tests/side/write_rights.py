"""Writes images that say something about training, with the libraries of others: C2PA's own, and exiv2 for IPTC's.

python write_rights.py FOLDER    ->    {name of a file: [signal, what it says]}, for all ways of saying it
"""

import io
import json
import sys
from pathlib import Path

import pyexiv2
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "rights"))
import make

PURPOSES = ("data_mining", "ai_training", "ai_generative_training", "ai_inference")
USES = ("allowed", "notAllowed", "constrained")
PLUS = "http://ns.useplus.org/ldf/vocab/"
VALUES = (
    "DMI-UNSPECIFIED",
    "DMI-ALLOWED",
    "DMI-PROHIBITED",
    "DMI-PROHIBITED-AIMLTRAINING",
    "DMI-PROHIBITED-GENAIMLTRAINING",
    "DMI-PROHIBITED-EXCEPTSEARCHENGINEINDEXING",
    "DMI-PROHIBITED-SEECONSTRAINT",
)


def main() -> None:
    folder, said, signs = Path(sys.argv[1]), {}, make.signer()
    for label in ("c2pa", "cawg"):
        for purpose in PURPOSES:
            for use in USES:
                for extension in ("jpg", "png", "webp", "avif") if purpose == "ai_training" else ("jpg",):
                    name = f"{label}-{purpose}-{use}.{extension}"
                    entries = {f"{label}.{purpose}": {"use": use}}
                    content = make.signed(signs, make.KINDS[extension], f"{label}.training-mining", entries)
                    (folder / name).write_bytes(content)
                    said[name] = ["c2pa", f"{use} {purpose}"]
    for value in VALUES:
        for extension in ("jpg", "png", "webp"):
            image, name = io.BytesIO(), f"{value}.{extension}"
            Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(image, make.KINDS[extension])
            with pyexiv2.ImageData(image.getvalue()) as data:
                data.modify_xmp({"Xmp.plus.DataMining": PLUS + value, "Xmp.dc.creator": ["somebody"]})
                (folder / name).write_bytes(data.get_bytes())
            said[name] = ["iptc", value]
    print(json.dumps(said))


if __name__ == "__main__":
    main()
