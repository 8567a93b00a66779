"""ComfyUI's models, steered through its own attention-override seam; nothing of that program is imported or copied here."""
