"""The HTTP side of the server: requests checked, answers written as OpenAI's API has them."""
