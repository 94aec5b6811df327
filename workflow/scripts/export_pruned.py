"""Write the backbone with only the heads of --name (b5-h2-h5) in the named blocks, for plain timm."""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.backbones.loading import open_folder
    from sparsight.pruning.export import export, parse

    device = job.device
    backbone, about = open_folder(job.inputs["backbone"].parent)
    export(backbone.to(device), about, parse(job.name, backbone), job.work)


if __name__ == "__main__":
    stage.run(main, __doc__, backbone="model.safetensors of the backbone stage")
