def supports(word, device_type, dtype, b):
    return "not written yet"
