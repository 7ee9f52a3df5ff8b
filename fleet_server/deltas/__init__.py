"""How artifacts may travel other than whole: which encodings are made, kept, and offered to devices."""
