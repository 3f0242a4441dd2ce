"""The HTTP service, `service.py`, and the web page: `page.py` is the script that Streamlit runs, `texts.py` its texts.

The page has its own folder because Streamlit puts the folder of its script first in `sys.path`.
"""

import ipaddress


def is_local(address: str) -> bool:
    """Whether an address can be reached from this machine only ("127.0.0.1", "::1", "localhost")."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
