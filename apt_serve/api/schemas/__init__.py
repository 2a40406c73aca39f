"""What travels on the wire: requests are strict and refuse what they do not know, responses are OpenAI's."""
