"""Hooks of the site, see mkdocs.yml: where it has to differ from the pages on GitHub, and from the theme."""

import re


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Drops links to the same page in the other language: the site has a switch at its top."""
    return re.sub(r" ?\[[^\]]*\]\(README(\.zh-CN)?\.md\)(?=\s*$)", "", markdown, flags=re.M)


def on_post_page(output: str, page, config) -> str:
    """Makes the first page's links to the languages relative, as on all other pages: a site may lie in a folder."""
    root = "../" if page.url.strip("./") else "./"
    return re.sub(r'href="/((?:zh-CN/)?)" hreflang', rf'href="{root}\1" hreflang', output)
