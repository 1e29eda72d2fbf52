"""A chat model and its data on disk, and the study that is built of them."""

import shutil

import tiny_chat

from sbr_jax.settings import Hardware
from sbr_jax.studies import chat
from sbr_jax.studies.options import ChatOptions, Sources

DOMAINS = ("medical", "legal", "code")


def save_world(folder):
    """A model and a data folder."""
    tiny_chat.save_data(folder / "data")
    tiny_chat.save_model(folder / "model")
    return folder


def copy_world(world, folder):
    """The same, to be damaged."""
    for name in ("data", "model"):
        shutil.copytree(world / name, folder / name)
    return folder


def build(folder, domains=DOMAINS, *, weights=False, hardware=Hardware(), **options):
    made = ChatOptions(**{**tiny_chat.SIZES, **options})
    sources = Sources(str(folder / "model"), str(folder / "data"))
    return chat.build_study(domains, made, sources, hardware, weights=weights)
