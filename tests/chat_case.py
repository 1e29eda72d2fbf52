"""A chat model and its data on disk, and the study that is built of them."""

import shutil

import tiny_chat

from sbr_jax.settings import Hardware
from sbr_jax.studies import chat
from sbr_jax.studies.options import ChatOptions, Sources

DOMAINS = ("medical", "legal", "code")


def save_world(folder, template=tiny_chat.TEMPLATE, **config):
    """A model and a data folder."""
    tiny_chat.save_data(folder / "data")
    tiny_chat.save_model(folder / "model", template, tiny_chat.changed(**config))
    return folder


def copy_world(world, folder):
    """The same, to be damaged."""
    for name in ("data", "model"):
        shutil.copytree(world / name, folder / name)
    return folder


def build(folder, domains=DOMAINS, weights=False, hardware=Hardware(), **options):
    return chat.build_study(
        domains,
        ChatOptions(**{**tiny_chat.SIZES, **options}),
        Sources(str(folder / "model"), str(folder / "data")),
        hardware,
        weights=weights,
    )


def flags(scope, values):
    """Settings as words of a command line."""
    words = []
    for name, value in values.items():
        several = value if isinstance(value, tuple) else (value,)
        words += [f"--{scope}.{name.replace('_', '-')}", *map(str, several)]
    return words


SMALL = flags("study", tiny_chat.SIZES)
