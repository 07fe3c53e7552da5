"""Real English sentences that every machine already has: the documentation inside Python's own library.

A fixed list of standard modules is read as source text, their docstrings are cut into sentences, and only
sentences of plain prose are kept. The result depends on the Python version alone (the texts change a little
between versions), never on the machine, so figures can be compared.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

__all__ = ["SOURCE", "library_sentences"]

SOURCE = "sentences from the docstrings of the Python standard library"

MODULES = (
    "abc argparse asyncio.base_events asyncio.events asyncio.locks asyncio.queues asyncio.streams "
    "asyncio.tasks base64 bisect calendar cmd codecs collections concurrent.futures._base configparser "
    "contextlib copy csv dataclasses datetime decimal difflib doctest email.message email.policy enum "
    "fileinput filecmp fractions ftplib functools gettext glob gzip hashlib heapq html.parser http.client "
    "http.cookiejar http.server imaplib importlib.abc inspect ipaddress json json.decoder json.encoder "
    "linecache locale logging logging.config logging.handlers mailbox mimetypes multiprocessing.managers "
    "multiprocessing.pool multiprocessing.shared_memory numbers operator optparse os pathlib pdb pickle "
    "pickletools platform plistlib poplib pprint profile pydoc queue random sched selectors shelve shlex "
    "shutil smtplib socket socketserver sqlite3.dump ssl statistics string subprocess tarfile tempfile "
    "textwrap threading timeit tokenize trace traceback types typing unittest.case unittest.loader "
    "unittest.mock urllib.parse urllib.request urllib.robotparser uuid warnings wave weakref webbrowser "
    "xml.dom.minidom xml.etree.ElementTree xml.sax.handler xmlrpc.client zipfile"
).split()

_PROSE = re.compile(r"[A-Z][a-z]*[ ,'][A-Za-z0-9 ,;:'()\-]+\.")
_MIN_WORDS, _MAX_LENGTH = 7, 160


def library_sentences(count: int = 256) -> list[str]:
    """`count` distinct sentences, taken evenly from all of them in module order.

    Raises RuntimeError where Python came without its source files and fewer are to be had.
    """
    found = _all_sentences()
    if len(found) < count:
        raise RuntimeError(
            f"this Python has only {len(found)} documentation sentences, {count} are needed; "
            "use a Python with its standard library as source files (not zipped, not stripped with -OO)"
        )
    return [found[i * len(found) // count] for i in range(count)]


@cache
def _all_sentences() -> tuple[str, ...]:
    return tuple(dict.fromkeys(s for module in MODULES for s in _module_sentences(module)))


def _module_sentences(module: str) -> Iterator[str]:
    source = _source(module)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _sentences(ast.get_docstring(node) or "")


def _source(module: str) -> str:
    """Source text of a standard module, found without running it; empty if it has none."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # a parent package that some builds leave out (sqlite3, ssl)
        return ""
    path = Path(spec.origin) if spec and spec.origin else None
    return path.read_text(encoding="utf-8") if path and path.suffix == ".py" and path.is_file() else ""


def _sentences(docstring: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", docstring):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            prose = len(sentence) <= _MAX_LENGTH and len(sentence.split()) >= _MIN_WORDS
            if prose and _PROSE.fullmatch(sentence):
                yield sentence
