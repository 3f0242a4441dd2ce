"""The web page: `page.py` is the script that Streamlit runs, `texts.py` its words in English and Chinese.

A folder of its own, because Streamlit puts the folder of its script in front of `sys.path`.
"""

import ipaddress


def is_local(address: str) -> bool:
    """Whether an address means this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
