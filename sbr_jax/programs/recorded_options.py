"""Options of a study as a finished run had them, and what may differ from them."""

from collections.abc import Mapping
from typing import Any

from sbr_jax import recipes as configs
from sbr_jax.programs import cli
from sbr_jax.programs.run import folder_options, parse_value
from sbr_jax.typing import UserError


def study_options(
    arguments: Any, preset: configs.Preset, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The run's options of the study, and what the command line adds."""
    options = {**preset.options, **unlisted(config["study"])}
    if strange := sorted(config["study"].keys() - preset.options.keys()):
        raise UserError(
            f"the run has options that the preset '{preset.name}' lacks "
            f"({', '.join(strange)}): name the preset of the run"
        )
    options |= folder_options(preset, data=arguments.data, model=arguments.model)
    for text in arguments.overrides:
        key, equals, raw = text.partition("=")
        name = key.removeprefix("study.")
        if not equals or name == key:
            raise UserError(f"--set: expected study.KEY=VALUE, got '{text}'")
        if name not in preset.options:
            raise cli.unknown("option of --set", name, preset.options)
        value = parse_value(raw)
        if configs.recorded({name: True}) and value != options[name]:
            raise UserError(
                f"--set study.{name}: expected the run's {options[name]!r}, got "
                f"{value!r}: only folders and {', '.join(configs.HARDWARE)} may differ"
            )
        options[name] = value
    return options


def unlisted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they were before JSON made lists of tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
