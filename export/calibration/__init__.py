"""Calibration: what is measured or fitted once per model, on a person's own text, and kept in its package.

`decoder` runs a package in torch and shows what its layers see; a method (`kvzap`, `locret`, `attention_gate`) makes
small heads of that; `files` writes and reads them (numpy only: whoever runs a calibrated model needs no torch).
"""
