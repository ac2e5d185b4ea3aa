"""How the files beside this one were made: images of 16 x 16 pixels signed by C2PA's own library, c2pa-python 0.38.1.

    pip install c2pa-python==0.38.1 cryptography pillow && python make.py

The certificates are made here and thrown away, so a verifier trusts none of the files; nothing here verifies.
"""

import datetime
import io
import json
from pathlib import Path

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

HERE = Path(__file__).parent
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "avif": "AVIF"}
CASES = {  # name -> (label, entries)
    "not_allowed": (
        "c2pa.training-mining",
        {"c2pa.ai_training": {"use": "notAllowed"}, "c2pa.data_mining": {"use": "allowed"}},
    ),
    "constrained": (
        "cawg.training-mining",
        {"cawg.ai_generative_training": {"use": "constrained", "constraint_info": "ask first"}},
    ),
    "two_pieces": ("c2pa.training-mining", {"c2pa.data_mining": {"use": "notAllowed"}}),  # of more than 64 kB
    "allowed": (
        "cawg.training-mining",
        {"cawg.ai_training": {"use": "allowed"}, "cawg.ai_inference": {"use": "notAllowed"}},
    ),
}


def name(common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "a test"), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def certificate(subject, issuer, key, signer, ca):
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name(issuer)).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now)
    made = made.not_valid_after(now + datetime.timedelta(days=3650))
    made = made.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    made = made.add_extension(x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), critical=True)
    made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    if not ca:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def signer():
    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    chain = certificate("signer", "root", own, root, False) + certificate("root", "root", root, root, True)
    private = own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return c2pa.Signer.from_info(c2pa.C2paSignerInfo(b"es256", chain, private, None))


def signed(signs, kind, label, entries, more=()):
    """An image of 16 x 16 pixels in one of Pillow's formats, with an assertion of training and mining, signed."""
    context = c2pa.Context(c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}}))
    created = {"action": "c2pa.created", "digitalSourceType": "http://c2pa.org/digitalsourcetype/empty"}
    manifest = {
        "claim_generator_info": [{"name": "a test", "version": "1"}],
        "assertions": [
            {"label": "c2pa.actions", "data": {"actions": [created]}},
            *more,
            {"label": label, "data": {"entries": entries}},
        ],
    }
    image, out = io.BytesIO(), io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(image, kind)
    image.seek(0)
    c2pa.Builder(json.dumps(manifest), context).sign(signs, f"image/{kind.lower()}", image, out)
    return out.getvalue()


def main():
    signs = signer()
    for case, (label, entries) in CASES.items():
        for extension, kind in KINDS.items():
            if case != "not_allowed" and extension != "jpg":
                continue
            more = [{"label": "org.test.long", "data": {"text": "x" * 70_000}}] if case == "two_pieces" else []
            (HERE / f"{case}.{extension}").write_bytes(signed(signs, kind, label, entries, more))


if __name__ == "__main__":
    main()
