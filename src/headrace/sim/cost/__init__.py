"""What a step costs on hardware you may not have: seconds, joules and bytes, by several models behind one Protocol.

`batch` is the joint; `placement` says what sits where; `analytic` prices operators on a roofline under the conventions
of `conventions`; `linear`, `table`, `fewshot` and `idealized` are fitted to measurements; `bounds` holds closed forms.
"""
