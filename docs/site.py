"""Hook of the site (mkdocs.yml): what a page needs on GitHub and not there."""

import re


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Drops links to the same page in the other language: the site has a switch at its top."""
    return re.sub(r" ?\[[^\]]*\]\([^)]*README(\.zh-CN)?\.md\)(?=\s*$)", "", markdown, flags=re.M)
