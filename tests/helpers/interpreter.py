"""Triton's interpreter without its repeated work.

At each call of a device function it looks through triton.language for what to replace, which took half of the time of
an interpreted test. What was replaced stays so until the launch ends, so once for each launch is enough.
"""

import functools
from collections.abc import Callable
from typing import Any


def replace_language_once_a_launch() -> None:
    """From now on; nothing with a Triton whose interpreter works in another way."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    replaced: list[set[str]] = []  # names of modules, of the launch that runs
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    @functools.cache
    def seen_by(function: Callable[..., Any]) -> frozenset[str]:
        modules = (language, language.core)
        return frozenset(m.__name__ for m in modules for value in function.__globals__.values() if value is m)

    def replace_once(function: Callable[..., Any]) -> Any:
        wanted = seen_by(function)
        if replaced and wanted <= replaced[-1]:
            return interpreter._LangPatchScope()
        if replaced:
            replaced[-1].update(wanted)
        return replace(function)

    @functools.wraps(launch)
    def launch_once(self: Any, *arguments: Any, **options: Any) -> Any:
        replaced.append(set())
        try:
            return launch(self, *arguments, **options)
        finally:
            replaced.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, launch_once
