"""The web page: `page.py` is the script that Streamlit runs, `texts.py` its words in English and Chinese.

A folder of its own, because Streamlit puts the folder of its script in front of `sys.path`.
"""
