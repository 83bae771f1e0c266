"""Builds the documentation site: `python -m tools.site` writes site/ from docs/ and from what the code declares."""

from __future__ import annotations

import hashlib
import importlib
import json
import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tinkerbell_core import __version__
from tinkerbell_server.api.native_openapi import OPERATIONS, openapi_document
from tools.loss_pages import bundled_losses, escaped, loss_index, loss_page

ROOT = Path(__file__).parents[1]
DOCS, BUILD, SITE = ROOT / "docs", ROOT / "build" / "site", ROOT / "site"
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
"""Pages of the site that are files at the root of the repository."""

PYTHON_API = {
    "tinker_client": "The client.",
    "tinkerbell_core": "The names for authors of losses.",
    "tinkerbell_core.functional": "Functions for the body of a loss.",
    "tinkerbell_core.hyperparameters": "The ranges of hyperparameters.",
    "tinkerbell_core.testing": "The conformance kit.",
    "tinkerbell_core.errors": "The errors.",
    "tinkerbell_core.types": "The structs that the client and the server exchange.",
}

MERMAID, MERMAID_SHA256 = "11.16.0", "74d7c46dabca328c2294733910a8aa1ed0c37451776e8d5295da38a2b758fb9b"

NAV: list[tuple[str, Any]] = [
    ("Start here", "index.md"),
    ("Write a loss", [("Custom losses", "custom-losses.md"), ("A loss as a package", "loss-plugins.md")]),
    ("Data", "data.md"),
    ("Losses", [("Which loss", "which-loss.md"), ("Comparison with other projects", "peers.md")]),
    ("Run a server", [("Operators", "operators.md"), ("Security", "security.md")]),
    ("Coming from", [("Tinker", "coming-from-tinker.md"), ("TRL", "coming-from-trl.md")]),
    (
        "Reference",
        [
            ("HTTP API", "http-api.md"),
            ("OpenAI API", "openai.md"),
            ("Python API", "python-api.md"),
            ("Settings", "settings.md"),
        ],
    ),
    ("Architecture", "architecture.md"),
    ("Performance", "performance.md"),
    ("Project", [("Changelog", "changelog.md"), ("Contributing", "contributing.md")]),
]

CSS = """\
.md-typeset table:not([class]) td:first-child code { white-space: nowrap; }
.mermaid { overflow-x: auto; }
"""

CONFIG = """\
[project]
site_name = "Tinkerbell"
site_description = "Train a language model with any loss function, on your own machine, over HTTP."
docs_dir = "docs"
site_dir = "site"
use_directory_urls = false
extra_css = ["site.css"]
nav = {nav}

[project.theme]
font = false
features = ["content.code.copy", "navigation.footer", "navigation.indexes", "navigation.top", "search.highlight"]

[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"
toggle.icon = "lucide/sun"
toggle.name = "Switch to dark mode"

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"
toggle.icon = "lucide/moon"
toggle.name = "Switch to light mode"

[project.plugins.search]

[project.plugins.mkdocstrings.handlers.python]
paths = [{root}]

[project.plugins.mkdocstrings.handlers.python.options]
preload_modules = ["tinkerbell_core"]
show_source = false
show_root_heading = true
show_root_full_path = false
heading_level = 3
separate_signature = true
show_signature_annotations = true
line_length = 100

[project.markdown_extensions]
admonition = {{}}
attr_list = {{}}
md_in_html = {{}}
tables = {{}}
toc.permalink = true
pymdownx.highlight.pygments_lang_class = true
pymdownx.inlinehilite = {{}}
pymdownx.superfences.custom_fences = [
  {{ name = "mermaid", class = "mermaid", format = "pymdownx.superfences.fence_code_format" }},
]
"""


def write_sources() -> None:
    """Write the pages and the configuration that the generator reads, into build/site."""
    shutil.rmtree(BUILD, ignore_errors=True)
    pages = BUILD / "docs"
    (pages / "losses").mkdir(parents=True)
    # only on the pages with a diagram, because the script has 3 MB
    script = '\n<script src="mermaid.min.js"></script>\n' if copy_mermaid(pages) else ""
    for file in sorted(DOCS.glob("*.md")):
        text = site_links(file.read_text(), "docs")
        (pages / file.name).write_text(text + script if "```mermaid" in text else text)
    for name, source in PAGES.items():
        (pages / name).write_text(site_links((ROOT / source).read_text(), ""))
    losses = bundled_losses()
    (pages / "losses" / "index.md").write_text(loss_index(losses))
    for specs in losses.values():
        for spec in specs:
            (pages / "losses" / f"{spec.name}.md").write_text(loss_page(spec))
    document = openapi_document(__version__)
    (pages / "openapi.json").write_text(json.dumps(document, indent=1) + "\n")
    (pages / "http-api.md").write_text(http_api_page(document))
    (pages / "python-api.md").write_text(python_api_page())
    (pages / "site.css").write_text(CSS)
    nav = [(title, list(target) if isinstance(target, list) else target) for title, target in NAV]
    dict(nav)["Losses"].append(
        (
            "All losses",
            [
                "losses/index.md",
                *((name, [(spec.name, f"losses/{spec.name}.md") for spec in specs]) for name, specs in losses.items()),
            ],
        )
    )
    settings = {"root": str(ROOT), "nav": nav}
    (BUILD / "zensical.toml").write_text(CONFIG.format(**{key: _toml(value) for key, value in settings.items()}))


def _toml(value: Any) -> str:  # Any: text, or lists of text and of titled entries
    if isinstance(value, tuple):
        return f"{{ {json.dumps(value[0])} = {_toml(value[1])} }}"
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else json.dumps(value)


def site_links(text: str, folder: str) -> str:
    """The text of a page with its links as they are on the site. A link to a file that has no page becomes its text.

    folder: of the page in the repository.
    """
    pages = {file: name for name, file in PAGES.items()} | {
        f"docs/{file.name}": file.name for file in DOCS.glob("*.md")
    }

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        if urlsplit(target).scheme or target.startswith("#"):
            return match.group()
        path, _, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(folder, path))
        if file in pages:
            return f"[{label}]({pages[file]}{'#' + anchor if anchor else ''})"
        if file.startswith("docs/"):
            return f"[{label}]({file.removeprefix('docs/')}{'#' + anchor if anchor else ''})"
        if not (ROOT / file).exists():
            raise ValueError(f"{target} in a page of {folder or 'the repository'} is no file of the repository")
        return label

    # fenced code is kept as it is
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, part) for part in parts
    )


def copy_mermaid(pages: Path) -> bool:
    """Copy mermaid from the npm registry, so that the diagrams need no network. False if npm is not installed."""
    cached = ROOT / "build" / f"mermaid-{MERMAID}.min.js"
    if not cached.exists():
        if shutil.which("npm") is None:
            print("npm is not installed: a browser loads mermaid from its CDN")
            return False
        cached.parent.mkdir(exist_ok=True)
        subprocess.run(
            ["npm", "pack", "--silent", f"mermaid@{MERMAID}"], cwd=cached.parent, check=True, stdout=subprocess.DEVNULL
        )
        archive = cached.parent / f"mermaid-{MERMAID}.tgz"
        with tarfile.open(archive) as members:
            member = members.extractfile("package/dist/mermaid.min.js")
            assert member is not None
            cached.write_bytes(member.read())
        archive.unlink()
    if hashlib.sha256(cached.read_bytes()).hexdigest() != MERMAID_SHA256:
        raise RuntimeError(f"{cached} is not mermaid {MERMAID}: its SHA-256 differs; delete it")
    shutil.copy(cached, pages / "mermaid.min.js")
    return True


def http_api_page(document: dict[str, Any]) -> str:  # Any: JSON
    """The Markdown page of the native API."""
    parts = [
        "# HTTP API",
        "[Download the OpenAPI document](openapi.json). A server sends it at `GET /openapi.json`.",
        document["info"]["description"],
        "## Operations",
    ]
    for operation in OPERATIONS:
        described = document["paths"][operation.path][operation.method.lower()]
        body = described.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        answer = described["responses"]["200"]["content"]["application/json"]["schema"]
        if operation.queued:
            future, result = answer["allOf"]
            answer_text = f"{_type(future)} of {_type(result['properties']['result']['anyOf'][0])}"
        else:
            answer_text = _type(answer)
        rows = [
            "| property | value |",
            "|---|---|",
            f"| scope | {f'`{operation.scope}`' if operation.scope else 'no key needed'} |",
        ]
        rows += [f"| body | {_type(body)} |"] if body else []
        rows += [f"| answer | {answer_text} |"]
        for parameter in described.get("parameters", ()):
            rows.append(f"| {parameter['in']} parameter | `{parameter['name']}` ({_type(parameter['schema'])}) |")
        parts += [f"### {operation.method} {operation.path}", operation.summary, "\n".join(rows)]
    parts.append("## Structs")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts += [f"### {name}", escaped(schema.get("description", ""))]
        if "properties" not in schema:
            parts.append(f"Type: {_type(schema)}")
            continue
        rows = ["| field | type | default |", "|---|---|---|"]
        for key, field in schema["properties"].items():
            required = key in schema.get("required", ())
            default = f"`{json.dumps(field['default'])}`" if "default" in field else "required" if required else ""
            rows.append(f"| `{key}` | {_type(field)} | {default} |")
        parts.append("\n".join(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _type(schema: dict[str, Any]) -> str:  # Any: JSON
    """A JSON schema as a short text with links."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        if "prefixItems" in schema:
            return f"array of {', '.join(map(_type, schema['prefixItems']))}"
        return f"array of {_type(schema['items'])}" if isinstance(schema.get("items"), dict) else "array"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return f"{kind} (base64)" if "contentEncoding" in schema else str(kind)


def public_names(module: str) -> list[str]:
    """The public names of a module: `__all__`, or the functions and classes that it defines."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None)
    if names is None:
        names = [name for name, value in vars(loaded).items() if getattr(value, "__module__", None) == module]
    return [name for name in names if name == "__version__" or not name.startswith("_")]


def python_api_page() -> str:
    """The Markdown page of the Python API, which mkdocstrings fills in."""
    parts = ["# Python API"]
    for module, summary in PYTHON_API.items():
        parts += [f"## {module}", summary]
        parts += [f"::: {module}.{name}" for name in public_names(module)]
    return "\n\n".join(parts) + "\n"


class _Page(HTMLParser):
    """The anchors and the links of an HTML page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.external: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors.update(filter(None, (values.get("id"), values.get("name"))))
        for key in ("href", "src"):
            target = values.get(key)
            if target and not urlsplit(target).scheme and not target.startswith("//"):
                self.links.append(target)
            elif target and tag in ("script", "link", "img") and values.get("rel") != "canonical":
                self.external.append(target)


def broken_links(site: Path) -> Iterator[str]:
    """Each link to a file or an anchor that the site does not have, and each file that a page loads from elsewhere."""
    pages = {file: _Page(file) for file in sorted(site.rglob("*.html"))}
    for file, page in pages.items():
        if file.name == "404.html":
            continue  # its links begin at the root of the server
        for link in dict.fromkeys(page.links):
            path, _, anchor = link.partition("#")
            target = file if not path else (file.parent / unquote(path.partition("?")[0])).resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{file.relative_to(site)}: {link} does not exist"
            elif target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{file.relative_to(site)}: {link} has no such anchor"
        for link in page.external:
            yield f"{file.relative_to(site)}: loads {link} from another site"


def main() -> None:
    """Build the site. Exit with an error after a warning or a broken link."""
    write_sources()
    shutil.rmtree(SITE, ignore_errors=True)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"],
        cwd=BUILD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(built.stdout, end="")
    if (BUILD / "site").exists():
        shutil.move(BUILD / "site", SITE)
    problems = list(broken_links(SITE)) if SITE.exists() else ["no site was built"]
    print("\n".join([*problems, f"{len(list(SITE.rglob('*.html')))} pages in {SITE}, {len(problems)} broken links"]))
    if built.returncode or problems or re.search(r"\bwarning\b", built.stdout, re.IGNORECASE):
        sys.exit(1)


if __name__ == "__main__":
    main()
