def refuse_unfit(model, tower):
    pass
