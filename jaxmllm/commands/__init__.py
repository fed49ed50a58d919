"""What the commands do and show on the console; ``jaxmllm.cli`` says what they are called and take."""
