"""The paper's experiments as data: which arms, on which data, with which seeds; and what runs them."""
